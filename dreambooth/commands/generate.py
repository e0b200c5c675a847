"""`python -m dreambooth generate` draws pictures for prompts with a model folder or tarball."""

from __future__ import annotations

import argparse
import json
import logging
import secrets
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth.errors import ResourceError, UserError
from dreambooth.process import gpu_driver, libraries, temporary_folder
from dreambooth.process.memory import is_out_of_memory
from dreambooth.runs import run_folder
from dreambooth.runs.run_folder import Run
from dreambooth.settings.generate_options import GenerateSettings, read

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from dreambooth.diffusion.model import DiffusionModel
    from dreambooth.diffusion.safety import SafetyChecker
    from dreambooth.diffusion.sampling_request import SamplingRequest

log = logging.getLogger(__name__)

GRID_COLUMNS = 8
GRID_PICTURES = 256  # the first ones; nobody reads a longer sheet
GRID_CELL_PIXELS = 256
# Of the words of a file name; file systems allow 255 bytes in all, encrypted ones 143.
MAX_NAME_BYTES = 80
_ENDINGS = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
_DESCRIPTION = 0x010E  # Exif's ImageDescription


def main(args: argparse.Namespace) -> int:
    """Draw and write the pictures and print their paths; return 1 if one was not finite, else 0.

    Raises DreamBoothError, with one message, for wrong options, faulty models and full disks.
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
    # A state is put together with links, which do not lead to another disk.
    root = None if settings.state is None else Path(settings.model).parent
    with temporary_folder.temporary(root) as workspace:
        model, checker = _load(settings, workspace)
        requests = _requests(settings, seed)
        paths, lost = _draw(model, checker, requests, settings)
    for path in paths:
        print(path)
    if lost:
        print(
            f"error: {len(lost)} of {len(requests)} pictures came out not finite and were not "
            f"written (seed {_seeds(lost)}); --precision fp32 may help.",
            file=sys.stderr,
        )
    return 1 if lost else 0


def _load(
    settings: GenerateSettings, workspace: Path
) -> tuple[DiffusionModel, SafetyChecker | None]:
    with libraries.importing():
        import torch

        from dreambooth.diffusion import float_types, model, safety
        from dreambooth.model_folder import source

    gpu_driver.refuse_gpu_without_kernels(torch)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = source.locate(
        _model_of_the_state(settings, workspace) if settings.state is not None else settings.model,
        given="with --model",
        prediction_type=settings.prediction_type,
        base=settings.base,
    )
    folder = source.open_source(found, workspace)
    _check_steps(settings.num_inference_steps, folder)
    dtype = float_types.dtype_for(settings.precision, device)
    try:
        loaded, checker = model.load(folder, device=device, dtype=dtype), None
        if not settings.no_safety_checker:
            checker = safety.load(folder, device=device, dtype=dtype)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError(
            "The model does not fit in the GPU's free memory; --precision fp16 halves its need."
        ) from error
    for warning in loaded.facts.warnings:
        log.warning(warning)
    return loaded, checker


def _model_of_the_state(settings: GenerateSettings, workspace: Path) -> str:
    """Put a model together of a run's model and a state, and return its folder."""
    from dreambooth.job import chosen_state

    run = Run(Path(settings.model).parent)
    if not (run.exists and Path(settings.model).name == run_folder.MODEL):
        raise UserError("With --state, --model must be the folder `model` of a run.")
    assert settings.state is not None
    return str(chosen_state.compose(run, settings.state, workspace / "state"))


def _check_steps(steps: int, folder: Path) -> None:
    """Refuse steps that the model's noise schedule has no room for, before weights are read."""
    from dreambooth.diffusion import sampling_request
    from dreambooth.model_folder import layout

    layout.validate_folder(folder)
    scheduler = layout.read_index(folder)["scheduler"][1]
    known = sampling_request.step_range(scheduler, layout.component_config(folder, "scheduler"))
    if steps not in known:
        raise UserError(
            f"--num_inference_steps must lie between {known[0]} and {known[-1]} with this model, "
            f"not {steps}."
        )


def _requests(settings: GenerateSettings, seed: int) -> list[SamplingRequest]:
    """Return one request per picture: prompts in order, with all pictures of each."""
    from dreambooth.diffusion.sampling_request import SamplingRequest

    prompts = [prompt for prompt in settings.prompts for _ in range(settings.count)]
    return [
        SamplingRequest(
            prompt=prompt,
            negative_prompt=settings.negative_prompt,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            width=settings.width,
            height=settings.height,
            seed=seed + i,
        )
        for i, prompt in enumerate(prompts)
    ]


def _draw(
    model: DiffusionModel,
    checker: SafetyChecker | None,
    requests: Sequence[SamplingRequest],
    settings: GenerateSettings,
) -> tuple[list[Path], list[SamplingRequest]]:
    """Write every picture as it is drawn, then the grid; what the checker hides is black.

    Return the paths, and the requests whose pictures are not finite.
    """
    import numpy as np

    from dreambooth.diffusion import sampling, sampling_request
    from dreambooth.process.progress import Progress

    facts = sampling.sampling_facts(model)
    for request in requests:
        sampling_request.check(facts, request)
    total = sampling.count_steps(model, requests, batch_size=settings.batch_size)
    paths: list[Path] = []
    lost: list[SamplingRequest] = []
    hidden: list[SamplingRequest] = []
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
            if checker is not None and checker.hides(picture):
                picture = np.zeros_like(picture)
                hidden.append(request)
            path = settings.out / file_name(i, len(requests), request, settings.format)
            image = _write_picture(path, picture, request, _name_of_the_model(settings))
            paths.append(path)
            if len(drawn) < GRID_PICTURES:
                drawn.append((request.prompt, image))
    if hidden:
        log.warning(
            "the model's safety checker found %d of %d pictures unsafe, and they are black (seed "
            "%s): change the prompt or the seed, or give --no_safety_checker",
            *(len(hidden), len(requests), _seeds(hidden)),
        )
    if len(drawn) > 1:
        paths.append(_write_grid(settings.out / "grid.png", drawn))
    return paths, lost


def _name_of_the_model(settings: GenerateSettings) -> str:
    return settings.model + (f" at step {settings.state}" if settings.state is not None else "")


def _seeds(requests: Sequence[SamplingRequest]) -> str:
    return ", ".join(str(request.seed) for request in requests)


def file_name(number: int, total: int, request: SamplingRequest, format: str = "png") -> str:
    """Return a file name that sorts in order, such as 003_a-photo-of-a-cat_seed42.png."""
    words = _words(request.prompt)
    parts = (str(number).zfill(max(3, len(str(total - 1)))), words, f"seed{request.seed}")
    return "_".join(part for part in parts if part) + _ENDINGS[format]


def _words(prompt: str) -> str:
    """Return the letters and digits of a prompt, of any script, with dashes between the words."""
    text = ""
    for character in unicodedata.normalize("NFC", prompt).lower():
        # A vowel sign or an accent belongs to the letter before it.
        mark = unicodedata.category(character).startswith("M") and text[-1:] not in ("", "-")
        if character.isalnum() or mark:
            text += character
        elif text[-1:] != "-":
            text += "-"
        if len(text) > MAX_NAME_BYTES:
            break
    encoding = sys.getfilesystemencoding()
    cut = text.strip("-").encode(encoding, "ignore")[:MAX_NAME_BYTES]
    return cut.decode(encoding, "ignore").strip("-")


def _write_picture(
    path: Path, picture: np.ndarray, request: SamplingRequest, model: str
) -> Image.Image:
    """Write a picture with the settings it was drawn with; return it shrunk to a cell of the grid.

    PNG holds the settings as texts, JPEG and WebP as JSON in Exif's ImageDescription.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    facts = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "seed": request.seed,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "model": model,
    }
    image = Image.fromarray(picture)
    if path.suffix == ".png":
        texts = PngInfo()
        for name, value in facts.items():
            texts.add_itxt(name, str(value))
        _save(image, path, pnginfo=texts)
    else:
        exif = Image.Exif()
        exif[_DESCRIPTION] = json.dumps(facts)
        _save(image, path, exif=exif, quality=95)
    image.thumbnail((GRID_CELL_PIXELS, GRID_CELL_PIXELS))
    return image


def _write_grid(path: Path, drawn: Sequence[tuple[str, Image.Image]]) -> Path:
    from dreambooth.report import contact_sheet

    rows: list[tuple[str, list[Image.Image]]] = []
    for prompt, image in drawn:
        if not rows or rows[-1][0] != prompt or len(rows[-1][1]) == GRID_COLUMNS:
            rows.append((prompt, []))
        rows[-1][1].append(image)
    cell = max(max(image.size) for _, image in drawn)
    _save(contact_sheet.draw(rows, cell=max(cell, GRID_CELL_PIXELS // 2)), path)
    return path


def _save(image: Image.Image, path: Path, **options: Any) -> None:
    try:
        image.save(path, **options)
    except OSError as error:
        reason = error.strerror or error
        raise ResourceError(f"Cannot write the picture {path}: {reason}.") from error
