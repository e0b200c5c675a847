"""Read and check the options of `python -m dreambooth generate`, and report all faults at once."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from dreambooth.errors import UserError
from dreambooth.limits import LIMITS
from dreambooth.process import addresses

PRECISIONS = ("auto", "fp32", "fp16", "bf16")
FORMATS = ("png", "jpeg", "webp")
# Stable Diffusion's noise schedules have 1,000 timesteps; most models allow 999 steps.
MAX_STEPS = 1_000
# A larger count is a typing error: printing the names alone would take minutes.
MAX_PICTURES_PER_PROMPT = 10_000

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateSettings:
    """The options, read and checked. seed: None if one is still to be chosen."""

    model: str
    prompts: tuple[str, ...]
    negative_prompt: str
    num_inference_steps: int
    guidance_scale: float
    width: int | None
    height: int | None
    seed: int | None
    count: int
    batch_size: int
    out: Path
    precision: str
    format: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options; their values stay strings until `read` parses them."""

    def option(
        name: str, metavar: str, help: str, default: str | None = None, *, alias: str | None = None
    ) -> None:
        names = (f"--{name}", *([f"--{alias}"] if alias else []))
        if default is not None:
            help += f" (default {default})"
        parser.add_argument(*names, dest=name, metavar=metavar, default=default, help=help)

    option("model", "MODEL", "model folder, tarball, hub id, or `tiny` (the embedded model)")
    parser.add_argument(
        "--prompt", metavar="P", action="append", help="what to draw; may be given several times"
    )
    option("negative_prompt", "P", "what to keep out of the pictures", "")
    option("num_inference_steps", "N", "denoising steps", "50", alias="steps")
    option("guidance_scale", "X", "how closely to follow the prompt; 1: no guidance", "7.5")
    option("width", "PIXELS", "a multiple of 8; without it the model's own resolution")
    option("height", "PIXELS", "a multiple of 8; without it the model's own resolution")
    option("seed", "N", "picture i uses seed + i; without it one is chosen and printed")
    option("count", "N", "pictures per prompt", "1")
    option("batch_size", "N", "pictures drawn at once; takes memory, changes nothing else", "4")
    option("out", "DIR", "folder for the pictures", "out/generate")
    option("precision", "|".join(PRECISIONS), "auto: half precision on a GPU, fp32 else", "auto")
    option("format", "|".join(FORMATS), "of the pictures; each holds how it was made", "png")


def read(args: argparse.Namespace) -> GenerateSettings:
    """Parse and check the options; raise one UserError that names all faults."""
    faults: list[str] = []

    def number(
        name: str, parse: Callable[[str], Number], ok: Callable[[Number], bool], want: str
    ) -> Number | None:
        text: str | None = getattr(args, name)
        if text is None:
            return None
        try:
            value = parse(text)
        except ValueError:
            value = None
        if value is None or not ok(value):
            faults.append(f"--{name} must be {want}, not {text!r}.")
            return None
        return value

    def counted(name: str, most: int) -> int:
        return number(name, int, lambda n: 1 <= n <= most, f"a whole number from 1 to {most}") or 1

    def side(name: str) -> int | None:
        most = LIMITS.max_generated_side_pixels
        want = f"a multiple of 8 from 8 to {most}"
        return number(name, int, lambda n: 8 <= n <= most and n % 8 == 0, want)

    prompts = tuple(args.prompt or ())
    if not args.model:
        faults.append("--model is missing: name a model folder or tarball, or `tiny`.")
    if not prompts:
        faults.append('--prompt is missing: say what to draw, as in --prompt "a photo of a cat".')
    faults += _prompt_faults((*prompts, args.negative_prompt))
    faults += _choice_faults(args)
    count = counted("count", MAX_PICTURES_PER_PROMPT)
    pictures = max(len(prompts) * count, 1)
    last = 2**64 - pictures
    seeds = f"a whole number from 0 to {last}"
    if pictures > 1:
        seeds += f" (picture i of {pictures} uses seed + i)"
    try:
        out = addresses.to_path(args.out, "--out")
    except UserError as error:
        out = Path()
        faults.append(str(error))
    settings = GenerateSettings(
        model=args.model or "",
        prompts=prompts,
        negative_prompt=args.negative_prompt,
        num_inference_steps=counted("num_inference_steps", MAX_STEPS),
        guidance_scale=number("guidance_scale", float, math.isfinite, "a finite number") or 0.0,
        width=side("width"),
        height=side("height"),
        seed=number("seed", int, lambda n: 0 <= n <= last, seeds),
        count=count,
        batch_size=counted("batch_size", LIMITS.max_generated_batch),
        out=out,
        precision=args.precision,
        format=args.format,
    )
    faults += _area_faults(settings.width, settings.height)
    if faults:
        raise UserError(" ".join(faults))
    return settings


def _area_faults(width: int | None, height: int | None) -> list[str]:
    """Return the fault of too large an area; with a side left to the model, it is checked later."""
    most = LIMITS.max_generated_pixels
    if width is None or height is None or width * height <= most:
        return []
    return [f"--width times --height must be at most {most} pixels, not {width} x {height}."]


def _choice_faults(args: argparse.Namespace) -> list[str]:
    return [
        f"--{name} must be one of {', '.join(choices)}, not {getattr(args, name)!r}."
        for name, choices in (("precision", PRECISIONS), ("format", FORMATS))
        if getattr(args, name) not in choices
    ]


def _prompt_faults(prompts: Iterable[str]) -> list[str]:
    faults = []
    for prompt in prompts:
        if len(prompt) > LIMITS.max_prompt_characters:
            faults.append(
                f"A prompt has {len(prompt)} characters; at most {LIMITS.max_prompt_characters} "
                "are taken."
            )
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            faults.append(f"The prompt {prompt!r} is not valid UTF-8 text.")
    return faults
