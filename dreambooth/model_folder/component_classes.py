"""Lists the only classes that a model folder may ask for (standard library only).

A name in a folder is never imported; it only chooses among the classes listed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SCHEDULERS = frozenset(
    f"{name}Scheduler"
    for name in (
        *("DDIM", "DDPM", "DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep"),
        *("EulerAncestralDiscrete", "EulerDiscrete", "HeunDiscrete", "KDPM2AncestralDiscrete"),
        *("KDPM2Discrete", "LMSDiscrete", "PNDM", "UniPCMultistep"),
    )
)

# Second-order noise schedulers, which need two U-Net calls per step.
TWO_CALLS_PER_STEP = frozenset(
    ("HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFamily:
    """A kind of text encoder with its tokenizers and pipelines; classes are (library, class)."""

    name: str
    pipelines: frozenset[str]
    text_encoder: frozenset[tuple[str, str]]
    tokenizer: frozenset[tuple[str, str]]


def _transformers(*classes: str) -> frozenset[tuple[str, str]]:
    return frozenset(("transformers", name) for name in classes)


CLIP = TextFamily(
    name="CLIP",
    pipelines=frozenset({"StableDiffusionPipeline"}),
    text_encoder=_transformers("CLIPTextModel"),
    tokenizer=_transformers("CLIPTokenizer", "CLIPTokenizerFast"),
)
# Taiyi Stable Diffusion, in Chinese.
BERT = TextFamily(
    name="BERT",
    pipelines=frozenset({"StableDiffusionPipeline"}),
    text_encoder=_transformers("BertModel"),
    tokenizer=_transformers("BertTokenizer", "BertTokenizerFast"),
)
# AltDiffusion, in nine or eighteen languages; its class has moved within diffusers.
XLM_ROBERTA = TextFamily(
    name="XLM-RoBERTa",
    pipelines=frozenset({"AltDiffusionPipeline"}),
    text_encoder=frozenset(
        (library, "RobertaSeriesModelWithTransformation")
        for library in ("alt_diffusion", "diffusers")
    ),
    tokenizer=_transformers("XLMRobertaTokenizer", "XLMRobertaTokenizerFast"),
)
TEXT_FAMILIES = (CLIP, BERT, XLM_ROBERTA)

# (library, class) by component.
COMPONENTS: Mapping[str, frozenset[tuple[str, str]]] = {
    "unet": frozenset({("diffusers", "UNet2DConditionModel")}),
    "vae": frozenset({("diffusers", "AutoencoderKL")}),
    "text_encoder": frozenset().union(*(family.text_encoder for family in TEXT_FAMILIES)),
    "tokenizer": frozenset().union(*(family.tokenizer for family in TEXT_FAMILIES)),
    "scheduler": frozenset(("diffusers", name) for name in SCHEDULERS),
    "safety_checker": frozenset({("stable_diffusion", "StableDiffusionSafetyChecker")}),
    "feature_extractor": _transformers(
        *("CLIPFeatureExtractor", "CLIPImageProcessor", "CLIPImageProcessorFast"),
        "CLIPImageProcessorPil",
    ),
}
PIPELINES: frozenset[str] = frozenset().union(*(family.pipelines for family in TEXT_FAMILIES))
# The end of messages that refuse other classes.
FAMILIES_LISTED = "; text encoders and tokenizers of the families {} can be used".format(
    ", ".join(
        f"{family.name} ({min(name for _, name in family.text_encoder)} with "
        f"{min(name for _, name in family.tokenizer)})"
        for family in TEXT_FAMILIES
    )
)
