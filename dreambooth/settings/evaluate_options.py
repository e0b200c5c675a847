"""Declare the options of `python -m dreambooth evaluate`, once, and read them."""

from __future__ import annotations

import argparse
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Final

from dreambooth.errors import HyperparameterError
from dreambooth.limits import LIMITS
from dreambooth.settings import command_line
from dreambooth.settings.knob import knobs_of, option

_PROMPT: Final = {"max_characters": LIMITS.max_prompt_characters}


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateSettings:
    """The options, read and checked."""

    model: str = option(
        MISSING, "The fine-tuned model: folder, tarball, hub id, or tiny (the embedded model)."
    )
    data: Path = option(MISSING, "The folder that it was trained on, with dataset_info.json.")
    base: str | None = option(
        None, "The model that it was made from; without it, what was kept is not measured."
    )
    prompts: Path | None = option(
        None,
        "File of prompts that put the subject elsewhere, one a line, or the DreamBooth paper's "
        'list; None: the instance prompt with "on a beach".',
    )
    other_prompt: str | None = option(
        None, "Of another class; None: a photo of a cat, or of a dog for cats.", **_PROMPT
    )
    features: str | None = option(
        None,
        "Folder of a CLIP, DINOv2 or ViT model whose features are compared; None: the judge for "
        "the embedded world, else EfficientNet-Lite0.",
    )
    text_image: str | None = option(
        None, "Folder of a whole CLIP model, which measures whether the place was drawn."
    )
    drawn: Path | None = option(
        None, "Folder of pictures that generate has drawn with the model: no others are drawn."
    )
    base_drawn: Path | None = option(None, "The same of the base.")
    pictures: int = option(16, "Pictures of each prompt.", minimum=2, maximum=1_000)
    num_inference_steps: int = option(
        50, "Denoising steps.", alias="steps", minimum=1, maximum=1_000
    )
    guidance_scale: float = option(7.5, "How closely to follow the prompt; 1: no guidance.")
    seed: int = option(0, "Picture i of each prompt uses seed + i.", minimum=0, maximum=2**63)
    batch_size: int = option(
        8,
        "Pictures drawn at once; takes memory, changes nothing else.",
        minimum=1,
        maximum=LIMITS.max_generated_batch,
    )
    out: Path = option(Path("out/evaluate"), "Folder for evaluation.json and sheet.png.")
    precision: str = option(
        "auto",
        "auto: half precision on a GPU, fp32 else.",
        choices=("auto", "fp32", "fp16", "bf16"),
    )


KNOBS: Final = knobs_of(EvaluateSettings)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options; their values stay strings until `read` parses them."""
    command_line.add_arguments(parser, KNOBS)


def read(arguments: argparse.Namespace) -> EvaluateSettings:
    """Parse and check the options; raise one HyperparameterError that names all faults."""
    values, faults = command_line.read(KNOBS, arguments, {})
    if faults:
        raise HyperparameterError(faults)
    return EvaluateSettings(**values)
