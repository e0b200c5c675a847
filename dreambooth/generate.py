"""`python -m dreambooth generate`: pictures for prompts, from a model folder or tarball."""

from __future__ import annotations

import argparse
import math
import re
import secrets
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from dreambooth.errors import ResourceError, UserError
from dreambooth.limits import LIMITS

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image

    from dreambooth.diffusion.model import DiffusionModel
    from dreambooth.diffusion.sampling import SamplingRequest

PRECISIONS = ("auto", "fp32", "fp16", "bf16")
# Every diffusion schedule of Stable Diffusion has 1,000 timesteps; more steps repeat themselves.
MAX_STEPS = 1_000
# Beyond it somebody has mistyped: their names alone would fill a terminal for minutes.
MAX_PICTURES_PER_PROMPT = 10_000
GRID_COLUMNS = 8
GRID_PICTURES = 256  # the first ones; a longer sheet nobody reads
GRID_CELL_PIXELS = 256

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The command line, read and checked; seed None: one is to be chosen."""

    model: str
    prompts: tuple[str, ...]
    negative_prompt: str
    steps: int
    guidance_scale: float
    width: int | None
    height: int | None
    seed: int | None
    count: int
    batch_size: int
    out: Path
    precision: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options, each with `_` or `-`; values stay strings, `read` parses them all."""

    def option(name: str, metavar: str, help: str, default: str | None = None) -> None:
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        if default is not None:
            help += f" (default {default})"
        parser.add_argument(*spellings, dest=name, metavar=metavar, default=default, help=help)

    option("model", "MODEL", "model folder, tarball, hub id, or `tiny` (the embedded model)")
    parser.add_argument(
        "--prompt", metavar="P", action="append", help="what to draw; may be given several times"
    )
    option("negative_prompt", "P", "what to keep out of the pictures", "")
    option("steps", "N", "num_inference_steps, denoising steps", "50")
    option("guidance_scale", "X", "how closely to follow the prompt; 1: no guidance", "7.5")
    option("width", "PIXELS", "a multiple of 8; without it the model's own resolution")
    option("height", "PIXELS", "a multiple of 8; without it the model's own resolution")
    option("seed", "N", "picture i uses seed + i; without it one is chosen and printed")
    option("count", "N", "pictures per prompt", "1")
    option("batch_size", "N", "pictures drawn at once; takes memory, changes nothing else", "4")
    option("out", "DIR", "folder for the pictures", "out/generate")
    option("precision", "|".join(PRECISIONS), "auto: half precision on a GPU, fp32 else", "auto")


def main(args: argparse.Namespace) -> int:
    """Draw, write and print the paths; return 1 if a picture came out not finite, else 0.

    Raises DreamBoothError, in one message, for wrong options, models and full disks.
    """
    settings = read(args)
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {settings.out} cannot be made: {error.strerror}.") from error
    seed = settings.seed
    if seed is None:
        seed = secrets.randbelow(2**32)
        print(f"seed {seed} (chosen at random; --seed {seed} draws them again)", flush=True)
    with tempfile.TemporaryDirectory(prefix="dreambooth-") as workspace:
        model = _load(settings, Path(workspace))
        requests = _requests(settings, seed)
        paths, lost = _draw(model, requests, settings)
    for path in paths:
        print(path)
    if lost:
        seeds = ", ".join(str(request.seed) for request in lost)
        print(
            f"error: {len(lost)} of {len(requests)} pictures came out not finite and were not "
            f"written (seed {seeds}); --precision fp32 may help.",
            file=sys.stderr,
        )
    return 1 if lost else 0


def read(args: argparse.Namespace) -> Settings:
    """Parse and check the options; raise UserError that tells all faults in one message."""
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
        return number(name, int, lambda n: n >= 8 and n % 8 == 0, "a positive multiple of 8")

    prompts = tuple(args.prompt or ())
    if not args.model:
        faults.append("--model is missing: name a model folder or tarball, or `tiny`.")
    if not prompts:
        faults.append('--prompt is missing: say what to draw, as in --prompt "a photo of a cat".')
    faults += _prompt_faults((*prompts, args.negative_prompt))
    if args.precision not in PRECISIONS:
        faults.append(
            f"--precision must be one of {', '.join(PRECISIONS)}, not {args.precision!r}."
        )
    count = counted("count", MAX_PICTURES_PER_PROMPT)
    last = 2**64 - len(prompts) * count
    settings = Settings(
        model=args.model or "",
        prompts=prompts,
        negative_prompt=args.negative_prompt,
        steps=counted("steps", MAX_STEPS),
        guidance_scale=number("guidance_scale", float, math.isfinite, "a finite number") or 0.0,
        width=side("width"),
        height=side("height"),
        seed=number("seed", int, lambda n: 0 <= n <= last, "a whole number from 0 to 2**64 - 1"),
        count=count,
        batch_size=counted("batch_size", MAX_PICTURES_PER_PROMPT),
        out=Path(args.out),
        precision=args.precision,
    )
    if faults:
        raise UserError(" ".join(faults))
    return settings


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


def _load(settings: Settings, workspace: Path) -> DiffusionModel:
    import torch

    from dreambooth.diffusion import model, source

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = source.open_source(source.locate(settings.model, None), workspace)
    try:
        return model.load(folder, device=device, dtype=_dtype(settings.precision, device))
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            "The model does not fit in the GPU's free memory; --precision fp16 halves its need."
        ) from error


def _dtype(precision: str, device: torch.device) -> torch.dtype:
    import torch

    if precision == "auto" and device.type == "cuda":
        # bf16 arithmetic is fast from compute capability 8.0 on; its range knows no overflow.
        precision = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)


def _requests(settings: Settings, seed: int) -> list[SamplingRequest]:
    """One request per picture: prompts in order, then the pictures of each."""
    from dreambooth.diffusion.sampling import SamplingRequest

    prompts = [prompt for prompt in settings.prompts for _ in range(settings.count)]
    return [
        SamplingRequest(
            prompt=prompt,
            negative_prompt=settings.negative_prompt,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            width=settings.width,
            height=settings.height,
            seed=seed + i,
        )
        for i, prompt in enumerate(prompts)
    ]


def _draw(
    model: DiffusionModel, requests: Sequence[SamplingRequest], settings: Settings
) -> tuple[list[Path], list[SamplingRequest]]:
    """Write every picture as it comes out, then the grid; return the paths and what was lost."""
    from dreambooth.diffusion import sampling
    from dreambooth.progress import Progress

    for request in requests:
        sampling.check(model, request)
    total = sampling.count_steps(model, requests, batch_size=settings.batch_size)
    paths: list[Path] = []
    lost: list[SamplingRequest] = []
    drawn: list[tuple[str, Image.Image]] = []
    with Progress(total, "generate", stream=sys.stderr) as progress:
        pictures = sampling.generate(
            model,
            requests,
            batch_size=settings.batch_size,
            on_step=lambda done, _: progress.update(done),
        )
        for i, (request, picture) in enumerate(zip(requests, pictures, strict=True)):
            if picture is None:
                lost.append(request)
                continue
            path = settings.out / file_name(i, len(requests), request)
            image = _write_picture(path, picture, request, settings.model)
            paths.append(path)
            if len(drawn) < GRID_PICTURES:
                drawn.append((request.prompt, image))
    if len(drawn) > 1:
        paths.append(_write_grid(settings.out / "grid.png", drawn))
    return paths, lost


def file_name(number: int, total: int, request: SamplingRequest) -> str:
    """Name a picture so that names sort in order: 003_a-photo-of-a-cat_seed42.png."""
    words = re.sub(r"[^a-z0-9]+", "-", request.prompt.lower()).strip("-")[:60].strip("-")
    parts = (str(number).zfill(max(3, len(str(total - 1)))), words, f"seed{request.seed}")
    return "_".join(part for part in parts if part) + ".png"


def _write_picture(
    path: Path, picture: np.ndarray, request: SamplingRequest, model: str
) -> Image.Image:
    """Write a PNG that says how it was made; return it no larger than a cell of the grid."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    facts = PngInfo()
    for name, value in (
        ("prompt", request.prompt),
        ("negative_prompt", request.negative_prompt),
        ("seed", request.seed),
        ("num_inference_steps", request.num_inference_steps),
        ("guidance_scale", request.guidance_scale),
        ("model", model),
    ):
        facts.add_itxt(name, str(value))
    image = Image.fromarray(picture)
    _save(image, path, facts)
    image.thumbnail((GRID_CELL_PIXELS, GRID_CELL_PIXELS))
    return image


def _write_grid(path: Path, drawn: Sequence[tuple[str, Image.Image]]) -> Path:
    from dreambooth import contact_sheet

    rows: list[tuple[str, list[Image.Image]]] = []
    for prompt, image in drawn:
        if not rows or rows[-1][0] != prompt or len(rows[-1][1]) == GRID_COLUMNS:
            rows.append((prompt, []))
        rows[-1][1].append(image)
    cell = max(max(image.size) for _, image in drawn)
    _save(contact_sheet.draw(rows, cell=max(cell, GRID_CELL_PIXELS // 2)), path)
    return path


def _save(image: Image.Image, path: Path, facts: object = None) -> None:
    try:
        image.save(path, pnginfo=facts)
    except OSError as error:
        reason = error.strerror or error
        raise ResourceError(f"Cannot write the picture {path}: {reason}.") from error
