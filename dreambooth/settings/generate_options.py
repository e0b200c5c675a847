"""Declare the options of `python -m dreambooth generate`, once, and read them."""

from __future__ import annotations

import argparse
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Final

from dreambooth.errors import HyperparameterError
from dreambooth.limits import LIMITS
from dreambooth.settings import command_line
from dreambooth.settings.knob import (
    BASE_SENTENCE,
    PREDICTION_TYPE_SENTENCE,
    PREDICTION_TYPES,
    knobs_of,
    option,
)

_SIDES: Final = {"minimum": 8, "maximum": LIMITS.max_generated_side_pixels, "multiple_of": 8}
_PROMPT: Final = {"max_characters": LIMITS.max_prompt_characters}


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateSettings:
    """The options, read and checked. seed: None if one is still to be chosen."""

    model: str = option(
        MISSING, "Model folder, tarball, single file, hub id, or tiny (the embedded model)."
    )
    prediction_type: str | None = option(None, PREDICTION_TYPE_SENTENCE, choices=PREDICTION_TYPES)
    base: str | None = option(None, BASE_SENTENCE)
    state: int | None = option(
        None, "Step of a run whose kept state draws; --model is the run's model folder.", minimum=0
    )
    prompts: tuple[str, ...] = option(
        MISSING,
        'What to draw, as in --prompt "a photo of a cat"; may be given several times.',
        name="prompt",
        kind="str",
        is_repeated=True,
        **_PROMPT,
    )
    negative_prompt: str = option("", "What to keep out of the pictures.", **_PROMPT)
    # Stable Diffusion's noise schedules have 1,000 timesteps; most models allow 999 steps.
    num_inference_steps: int = option(
        50, "Denoising steps.", alias="steps", minimum=1, maximum=1_000
    )
    guidance_scale: float = option(7.5, "How closely to follow the prompt; 1: no guidance.")
    width: int | None = option(None, "In pixels; None: the model's own resolution.", **_SIDES)
    height: int | None = option(None, "In pixels; None: the model's own resolution.", **_SIDES)
    seed: int | None = option(
        None,
        "Picture i uses seed + i; None: a seed is chosen and printed.",
        minimum=0,
        maximum=2**64 - 1,
    )
    # A larger count is a typing error: printing the names alone would take minutes.
    count: int = option(1, "Pictures per prompt.", minimum=1, maximum=10_000)
    batch_size: int = option(
        4,
        "Pictures drawn at once; takes memory, changes nothing else.",
        minimum=1,
        maximum=LIMITS.max_generated_batch,
    )
    out: Path = option(Path("out/generate"), "Folder for the pictures.")
    no_safety_checker: bool = option(False, "Does not run the model's safety checker.")
    precision: str = option(
        "auto",
        "auto: half precision on a GPU, fp32 else.",
        choices=("auto", "fp32", "fp16", "bf16"),
    )
    format: str = option(
        "png",
        "File format of the pictures; each holds how it was made.",
        choices=("png", "jpeg", "webp"),
    )


KNOBS: Final = knobs_of(GenerateSettings)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options; their values stay strings until `read` parses them."""
    command_line.add_arguments(parser, KNOBS)


def read(arguments: argparse.Namespace) -> GenerateSettings:
    """Parse and check the options; raise one HyperparameterError that names all faults."""
    values, faults = command_line.read(KNOBS, arguments, {})
    prompts = values.pop("prompt", ())
    # With a side left to the model, the area is checked later.
    width, height = values.get("width") or 0, values.get("height") or 0
    most = LIMITS.max_generated_pixels
    if width * height > most:
        faults.append(
            f"--width times --height must be at most {most} pixels, not {width} x {height}."
        )
    pictures = max(len(prompts) * values.get("count", 1), 1)
    seed, last = values.get("seed", 0), 2**64 - pictures
    if seed > last:
        faults.append(
            f"--seed must be at most {last}, not {seed}: picture i of {pictures} uses seed + i."
        )
    if faults:
        raise HyperparameterError(faults)
    return GenerateSettings(prompts=prompts, **values)
