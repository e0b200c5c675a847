"""Declare every setting of a training job, once, in the table of knobs.

`Hyperparameters` holds name, type, default, bounds, choices and one sentence of each. The parsing
of SageMaker's strings, the command line, ``--help``, the table of docs/hyperparameters.md and the
JSON of defaults are derived from it. Published names and defaults are those of SageMaker
JumpStart's Stable Diffusion fine-tuning. Standard library only.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple

from dreambooth.errors import HyperparameterError, UserError, quoted
from dreambooth.limits import LIMITS, Limits
from dreambooth.settings.knob import (
    BASE_SENTENCE,
    PREDICTION_TYPE_SENTENCE,
    PREDICTION_TYPES,
    knobs_of,
    option,
)

PUBLISHED: Final = "published"
published = partial(option, origin=PUBLISHED)
accepted = partial(option, origin="accepted by JumpStart, not published")
ours = partial(option, origin="ours")

LR_SCHEDULERS: Final = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
)


class MemoryPlan(NamedTuple):
    """The switches that a memory plan fixes.

    frees_gradients: each gradient is used and freed as it arrives. Every forward and backward pass
    then runs twice, because the norm of all gradients must be known before any is clipped.
    """

    use_8bit_adam: bool
    gradient_checkpointing: bool
    frees_gradients: bool = False

    @property
    def can_step_fast(self) -> bool:
        """Return whether fast_step works with it: no recomputation, and gradients stay in place."""
        return not (self.gradient_checkpointing or self.frees_gradients)


# Fastest first; of two that run the same passes, fp32 states come first.
MEMORY_PLANS: Final[Mapping[str, MemoryPlan]] = {
    "fp32_adamw": MemoryPlan(False, False),
    "8bit_adamw": MemoryPlan(True, False),
    "8bit_adamw_checkpointing": MemoryPlan(True, True),
    "fp32_adamw_in_backward": MemoryPlan(False, True, frees_gradients=True),
    "8bit_adamw_in_backward": MemoryPlan(True, True, frees_gradients=True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyperparameters:
    """All knobs of a training job, each with its sentence. A step is one optimizer update."""

    with_prior_preservation: bool = published(
        False, "Adds class images and their loss term against forgetting the class; for faces."
    )
    num_class_images: int = published(
        100,
        "Class images wanted; those missing in class_data_dir are sampled with class_prompt.",
        minimum=1,
        maximum=LIMITS.max_class_images,
    )
    epochs: int = published(
        20, "Passes over the instance images; max_steps overrides it.", minimum=1
    )
    max_steps: int | None = published(
        None, "Steps to train; None: as many as epochs asks for.", minimum=1
    )
    batch_size: int = published(
        1, "Instance images per micro-batch, and class images sampled at once.", minimum=1
    )
    learning_rate: float = published(
        2e-06, "Peak learning rate of AdamW, per step.", above=0.0, maximum=1.0
    )
    prior_loss_weight: float = published(
        1.0, "Weight of the class images' loss; 0 leaves it out.", minimum=0.0
    )
    center_crop: bool = published(
        False, "Crops the centre of each resized picture instead of a random part."
    )
    lr_scheduler: str = published(
        "constant", "How the learning rate changes over the steps.", choices=LR_SCHEDULERS
    )
    adam_weight_decay: float = published(
        0.01, "AdamW's weight decay; biases and LayerNorm weights are left out.", minimum=0.0
    )
    adam_beta1: float = published(
        0.9, "AdamW's decay of the gradient's running mean.", minimum=0.0, below=1.0
    )
    adam_beta2: float = published(
        0.999, "AdamW's decay of the squared gradient's running mean.", minimum=0.0, below=1.0
    )
    adam_epsilon: float = published(1e-08, "Added to AdamW's denominator.", above=0.0, maximum=1.0)
    gradient_accumulation_steps: int = published(
        1, "Micro-batches whose gradients are averaged into one step.", minimum=1
    )
    max_grad_norm: float = published(
        1.0, "Gradients longer than this (global L2 norm) are scaled down to it.", above=0.0
    )
    seed: int = published(
        0, "Fixes all randomness: the same seed gives the same model.", minimum=0, maximum=2**32 - 1
    )
    compute_fid: bool = published(
        False, "Prints fid_score= at the end: how far generated pictures are from the given ones."
    )

    train_text_encoder: bool = accepted(
        False, "Trains the text encoder along with the U-Net; takes more memory."
    )
    gradient_checkpointing: bool | None = accepted(
        None, "Recomputes activations to save memory, about a third slower; None: by memory_plan."
    )
    use_8bit_adam: bool | None = accepted(
        None, "Keeps AdamW's state in 8 bits (bitsandbytes, GPU); None: by memory_plan."
    )
    mixed_precision: str | None = accepted(
        None,
        "Arithmetic of the training; None: bf16 or fp16 where the GPU has it, else no (fp32).",
        choices=("no", "fp16", "bf16"),
    )
    prior_generation_precision: str | None = accepted(
        None,
        "Arithmetic while class images are sampled; None: chosen by the device.",
        choices=("no", "fp32", "fp16", "bf16"),
    )
    lr_warmup_steps: int | None = accepted(
        None,
        "Steps over which the learning rate rises from 0; None: 0, and a tenth of the steps for "
        "constant_with_warmup (JumpStart's hidden 500 outlasted most runs).",
        minimum=0,
    )
    class_data_dir: str = accepted(
        "class_data_dir", "Folder of class images, relative to the training folder."
    )

    pretrained_model: str | None = ours(
        None,
        "Model to start from: a diffusers folder, its tarball, a single-file checkpoint, a hub id, "
        "or tiny (the embedded model); None: the model channel.",
    )
    prediction_type: str | None = ours(None, PREDICTION_TYPE_SENTENCE, choices=PREDICTION_TYPES)
    base: str | None = ours(None, BASE_SENTENCE)
    resolution: int | None = ours(
        None,
        "Side of the training pictures in pixels; None: the model's own.",
        minimum=64,
        maximum=2048,
        multiple_of=8,
    )
    checkpointing_steps: int | None = ours(
        None, "Saves a checkpoint every so many steps; None: no such rule.", minimum=1
    )
    checkpointing_minutes: float | None = ours(
        None, "Saves a checkpoint every so many minutes; None: left to the plan.", above=0.0
    )
    checkpoints_total_limit: int = ours(1, "Checkpoints kept; older ones are removed.", minimum=1)
    keep_last_checkpoint: bool = ours(
        False,
        "Keeps a checkpoint of the last step (10.4 GB at full size), from which a finished run can "
        "be trained further.",
    )
    resume: str = ours(
        "auto",
        "auto goes on from the last checkpoint that fits; fresh starts anew.",
        choices=("auto", "fresh"),
    )
    sample_steps: int = ours(0, "Draws a sample picture every so many steps; 0: none.", minimum=0)
    sample_prompt: str | None = ours(
        None, "Prompt of the sample pictures; None: the instance prompt."
    )
    memory_plan: str = ours(
        "auto",
        "auto takes the fastest plan that fits the GPU; all of them learn the same up to rounding.",
        choices=("auto", *MEMORY_PLANS),
        removed={
            "8bit_adamw_stochastic_rounding": "it saved memory and did not learn; the nearest plan "
            "is 8bit_adamw_in_backward"
        },
    )
    export_precision: str = ours(
        "fp32", "Number format of the exported weights.", choices=("fp32", "fp16")
    )
    export_single_file: bool = ours(
        False,
        "Also writes the model as one safetensors file for other tools, beside the report.",
    )
    compute_scores: bool = ours(
        False,
        "Prints subject_score=, class_kept= and clean= at the end, from 0 to 1: whether the "
        "subject was learned, its class kept, and pictures are clean.",
    )
    masked_loss: bool = ours(
        False,
        "Leaves the background out of the subject's loss: NAME.mask.png beside a picture, or its "
        "transparency, says where the subject is.",
    )
    meter: bool = ours(
        True,
        "Reads now and then how far training has moved the model, for at most a tenth of a run's "
        "work; the weights stay the same to the bit.",
    )
    meter_pictures_share: float = ours(
        0.15,
        "Share of a run's work for the meter's pictures of subject and classes: at the end, at the "
        "start, and where its readings turn; 0: none.",
        minimum=0.0,
        maximum=1.0,
    )
    early_stopping: bool = ours(
        False,
        "Ends the training once the meter sees that pictures burn or the class is being lost, and "
        "writes the model of the last good reading.",
    )
    keep_states: int = ours(
        2,
        "Good states, in fp16, that early_stopping keeps while it trains; more than two are kept "
        "in any run, and stay after it, to choose the model from.",
        minimum=1,
        maximum=100,
    )
    fid_features: str | None = ours(
        None,
        "Folder of a CLIP, DINOv2 or ViT model whose features compute_fid and compute_scores use; "
        "None: the built-in features.",
    )
    deterministic: bool = ours(
        False, "Asks CUDA for bit-identical runs, slower; a CPU always gives them."
    )
    prior_preservation_mode: str = ours(
        "images",
        "images compares with class images, prediction with what the base model predicts.",
        choices=("images", "prediction"),
    )
    training_guidance_scale: float = ours(
        1.0,
        "With prior_preservation_mode=prediction: trains the subject for pictures drawn with this "
        "guidance; 1.5 or 2 where they are burnt at 7.5.",
        minimum=1.0,
    )
    keep_subjects: str = ours(
        "auto",
        "Of a base that was taught subjects: holds their prompts to what it predicts, so that they "
        "are not forgotten; auto: where memory allows.",
        choices=("auto", "True", "False"),
    )
    fast_step: bool = ours(
        False,
        "On CUDA: passes in half precision beside fp32 master weights, replayed as a CUDA graph, "
        "losses read every 10 steps; no GPU has measured it yet.",
    )
    processes: str = ours(
        "auto",
        "Processes on each host, which train together, with batch_size pictures each; auto: one "
        "per GPU; 1: one process for the whole job, on the first host.",
        choices=("auto", *map(str, range(1, 17))),
    )

    @property
    def trains_on_class_images(self) -> bool:
        """Return whether the job needs class images: given ones, or some that it samples."""
        return self.with_prior_preservation and self.prior_preservation_mode == "images"

    @property
    def states_kept(self) -> int:
        """Return how many states the job keeps at a time while it trains."""
        return self.keep_states if self.early_stopping or self.keeps_states_to_choose else 0

    @property
    def keeps_states_to_choose(self) -> bool:
        """Return whether the states stay after the run: early stopping alone needs two."""
        return self.keep_states > 2

    @property
    def compares_features(self) -> bool:
        """Return whether the job ends with a score that compares features of pictures."""
        return self.compute_fid or self.compute_scores

    @property
    def predicts_the_prior(self) -> bool:
        """Return whether the frozen base model's prediction is the target of the class half."""
        return self.with_prior_preservation and self.prior_preservation_mode == "prediction"


KNOBS: Final = knobs_of(Hyperparameters)
_BY_NAME: Final = {knob.name: knob for knob in KNOBS}


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedHyperparameters:
    """The settings of a job, with warnings about unknown names."""

    hyperparameters: Hyperparameters
    warnings: tuple[str, ...]


def parse(raw: Mapping[str, object], *, limits: Limits = LIMITS) -> ParsedHyperparameters:
    """Parse raw settings in any encoding that SageMaker's clients send.

    A value may be a Python value, its ``str()``, its JSON, or JSON of its ``str()``; ``""``, None
    and null mean the default. Names may be spelled with ``-``. Unknown names are ignored with a
    warning each, but the platform's own silently. Raises one HyperparameterError that names every
    fault.
    """
    values: dict[str, Any] = {}
    faults: dict[str, str] = {}
    warnings: list[str] = []
    for given, value in raw.items():
        name = normalised(given)
        knob = _BY_NAME.get(name)
        if knob is None:
            if not is_platform_name(name):
                warnings.append(_unknown(name))
            continue
        try:
            values[name] = knob.parse(value, limits)
            faults.pop(name, None)
        except UserError as fault:
            faults[name] = str(fault)
    hyperparameters = Hyperparameters(**values)
    wrong = [
        sentence
        for names, sentence in _contradictions(hyperparameters)
        if not faults.keys() & set(names)
    ]
    if faults or wrong:
        raise HyperparameterError([*faults.values(), *wrong])
    return ParsedHyperparameters(hyperparameters=hyperparameters, warnings=tuple(warnings))


def normalised(name: str) -> str:
    """Return a knob's name as the table spells it: ``max_steps`` for ``--max-steps``."""
    return name.strip().lstrip("-").replace("-", "_")


def is_platform_name(name: str) -> bool:
    """Return whether SageMaker, its clients or a launcher give a setting of this name."""
    return name.startswith(("sagemaker_", "_tuning_")) or name in ("local_rank", "scale_lr")


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name[:100], _BY_NAME, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"There is no hyperparameter {quoted(name)}; it is ignored.{hint}"


def _contradictions(given: Hyperparameters) -> list[tuple[tuple[str, ...], str]]:
    """Return faults between settings that are valid alone, as (names involved, sentence)."""
    found: list[tuple[tuple[str, ...], str]] = []
    if given.prior_preservation_mode == "prediction" and not given.with_prior_preservation:
        found.append(
            (
                ("prior_preservation_mode", "with_prior_preservation"),
                "prior_preservation_mode=prediction needs with_prior_preservation=True.",
            )
        )
    if given.early_stopping and not given.meter:
        found.append((("early_stopping", "meter"), "early_stopping needs meter=True."))
    if given.keeps_states_to_choose and not given.meter:
        found.append((("keep_states", "meter"), "keep_states above 2 needs meter=True."))
    if given.training_guidance_scale != 1 and given.prior_preservation_mode != "prediction":
        found.append(
            (
                ("training_guidance_scale", "prior_preservation_mode"),
                "training_guidance_scale needs prior_preservation_mode=prediction.",
            )
        )
    if given.memory_plan in MEMORY_PLANS:
        found += _memory_plan_conflicts(given, MEMORY_PLANS[given.memory_plan])
    if given.fast_step:
        found += _against_the_fast_step(given)
    return found


def _memory_plan_conflicts(
    given: Hyperparameters, plan: MemoryPlan
) -> list[tuple[tuple[str, ...], str]]:
    """Return faults between a named memory plan and other settings."""
    fixed: list[tuple[str, object, object]] = [
        ("use_8bit_adam", plan.use_8bit_adam, given.use_8bit_adam),
        ("gradient_checkpointing", plan.gradient_checkpointing, given.gradient_checkpointing),
    ]
    found: list[tuple[tuple[str, ...], str]] = [
        (
            ("memory_plan", name),
            f"memory_plan={given.memory_plan} means {name}={planned}: "
            f"leave {name} unset, or memory_plan at auto.",
        )
        for name, planned, chosen in fixed
        if chosen is not None and chosen != planned
    ]
    if plan.frees_gradients and given.gradient_accumulation_steps > 1:
        found.append(
            (
                ("memory_plan", "gradient_accumulation_steps"),
                f"memory_plan={given.memory_plan} keeps no gradients that could be accumulated: "
                "leave gradient_accumulation_steps at 1 and raise batch_size instead.",
            )
        )
    return found


def _against_the_fast_step(given: Hyperparameters) -> list[tuple[tuple[str, ...], str]]:
    """Return faults between fast_step and other settings."""
    named = MEMORY_PLANS.get(given.memory_plan)
    wrong = {
        "train_text_encoder": given.train_text_encoder,
        "gradient_accumulation_steps": given.gradient_accumulation_steps > 1,
        "gradient_checkpointing": given.gradient_checkpointing is True,
        "mixed_precision": given.mixed_precision == "no",
        "memory_plan": named is not None and not named.can_step_fast,
    }
    return [
        (
            ("fast_step", name),
            f"fast_step does not go with {name}={getattr(given, name)}: leave one of them unset.",
        )
        for name, is_wrong in wrong.items()
        if is_wrong
    ]
