"""`python -m dreambooth evaluate` measures what a fine-tuned model draws and what it has kept.

It draws with the served defaults, compares the pictures by their features (a table of
docs/measurements.md says how), prints a table and writes evaluation.json and a contact sheet.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dreambooth.data import dataset_info, prompts
from dreambooth.data.dataset_info import DatasetInfo
from dreambooth.errors import ResourceError, UserError
from dreambooth.evaluation import prompt_list, vision_model
from dreambooth.evaluation.prompt_list import AskedPrompts
from dreambooth.process import gpu_driver, libraries, temporary_folder
from dreambooth.settings.evaluate_options import EvaluateSettings, read

if TYPE_CHECKING:
    import numpy as np
    import torch

    from dreambooth.diffusion.model import DiffusionModel
    from dreambooth.evaluation.features import FeatureNetwork
    from dreambooth.evaluation.measures import Measure, Values
    from dreambooth.evaluation.shares import Drawn
    from dreambooth.evaluation.text_image import TextImage
    from dreambooth.report.contact_sheet import Picture

log = logging.getLogger(__name__)

SHEET_CELL_PIXELS = 128
SHEET_PICTURES = 8  # of each prompt
_DRAWING = ("pictures", "num_inference_steps", "guidance_scale", "seed", "batch_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was measured. missing: why a measure is not there, by its name."""

    measures: Mapping[str, Measure]
    frechet_distance: float | None
    features: str
    missing: Mapping[str, str]


def main(arguments: argparse.Namespace) -> int:
    """Draw, measure, print the table and write the files; return 0.

    Raises DreamBoothError, with one message, for wrong options, data and models, and full disks.
    """
    settings = read(arguments)
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {settings.out} cannot be made: {error.strerror}.") from error
    info = _read_data(settings.data)
    asked = _asked_prompts(settings, info)
    given = (
        vision_model.read(settings.features, setting="--features") if settings.features else None
    )
    with libraries.importing():
        import torch

        from dreambooth.evaluation import clean, features, text_image

    gpu_driver.refuse_gpu_without_kernels(torch)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with temporary_folder.temporary() as workspace:
        reader = text_image.load(settings.text_image, device) if settings.text_image else None
        model = _load(settings.model, "--model", settings, device, workspace / "model")
        network = features.choose(given, model, resolution=model.resolution, device=device)
        side = model.resolution
        how = {name: getattr(settings, name) for name in _DRAWING}
        drawn = draw(model, asked.all, "drawing", **how)
        base: Drawn = {}
        base_loss = None
        del model
        if settings.base is not None:
            other = _load(settings.base, "--base", settings, device, workspace / "base")
            base = draw(other, asked.all, "drawing, base model", **how)
            base_loss = functools.partial(clean.denoising_loss, other)
        report = _measure(asked, info, drawn, base, network, reader, base_loss, side)
    _print(report)
    _write(settings, asked, info, drawn, base, report)
    return 0


def _read_data(folder: Path) -> DatasetInfo:
    inside = "give that folder with --data"
    found = prompts.read(folder, with_prior_preservation=False, inside=inside)
    with_class = found.class_prompt is not None
    info = dataset_info.read(
        folder, with_prior_preservation=with_class, given="with --data", inside=inside
    )
    for warning in info.warnings:
        log.warning(warning)
    return info


def _asked_prompts(settings: EvaluateSettings, info: DatasetInfo) -> AskedPrompts:
    elsewhere: tuple[str, ...] = (f"{info.instance_prompt} on a beach",)
    if settings.prompts is not None:
        elsewhere = prompt_list.read(
            settings.prompts,
            instance_prompt=info.instance_prompt,
            class_prompt=info.class_prompt,
        )
    is_cat = "cat" in (info.class_prompt or info.instance_prompt).lower().split()
    return AskedPrompts(
        subject=info.instance_prompt,
        elsewhere=elsewhere,
        own_class=info.class_prompt,
        other_class=settings.other_prompt or ("a photo of a dog" if is_cat else "a photo of a cat"),
    )


def _load(
    name: str, option: str, settings: EvaluateSettings, device: torch.device, workspace: Path
) -> DiffusionModel:
    from dreambooth.diffusion import float_types, model
    from dreambooth.model_folder import source

    workspace.mkdir()
    folder = source.open_source(source.locate(name, given=f"with {option}"), workspace)
    loaded = model.load(
        folder, device=device, dtype=float_types.dtype_for(settings.precision, device)
    )
    for warning in loaded.facts.warnings:
        log.warning(warning)
    return loaded


def draw(
    model: DiffusionModel,
    prompts: Sequence[str],
    label: str,
    *,
    pictures: int,
    num_inference_steps: int,
    guidance_scale: float,
    seed: int,
    batch_size: int,
) -> dict[str, list[np.ndarray | None]]:
    """Return the pictures of each prompt, None where one is not finite.

    Picture i of each starts from seed + i. label: what the line of progress says.
    """
    from dreambooth.diffusion import sampling
    from dreambooth.diffusion.sampling_request import SamplingRequest
    from dreambooth.process.progress import Progress

    requests = [
        SamplingRequest(
            prompt=prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            seed=seed + number,
        )
        for prompt in prompts
        for number in range(pictures)
    ]
    drawn: dict[str, list[np.ndarray | None]] = {prompt: [] for prompt in prompts}
    made = sampling.generate(model, requests, batch_size=batch_size)
    with Progress(len(requests), label, stream=sys.stderr, unit="pictures") as progress:
        for number, (request, picture) in enumerate(zip(requests, made, strict=True)):
            if picture is None:
                log.warning("a picture of seed %s is not finite and left out", request.seed)
            drawn[request.prompt].append(picture)
            progress.update(number + 1)
    return drawn


def _measure(
    asked: AskedPrompts,
    info: DatasetInfo,
    drawn: Drawn,
    base: Drawn,
    network: FeatureNetwork,
    reader: TextImage | None,
    base_loss: Callable[[Sequence[np.ndarray]], Values] | None,
    side: int,
) -> Report:
    from dreambooth.evaluation import scores, shares
    from dreambooth.evaluation.measures import summarised

    pictures = shares.MeasuredPictures(
        instance=_squared(info.instance_images, side),
        drawn=drawn,
        base=base,
        class_images=() if base else _squared(info.class_images, side),
    )
    found = shares.measured(asked, pictures, network, reader, base_loss)
    mine = shares.finite(drawn[asked.subject])
    return Report(
        measures={n: summarised(each) for n, each in found.items() if not isinstance(each, str)},
        missing={name: each for name, each in found.items() if isinstance(each, str)},
        frechet_distance=(
            scores.frechet_distance(network(pictures.instance), network(mine))
            if min(len(pictures.instance), len(mine)) > 1
            else None
        ),
        features=network.name,
    )


def _squared(paths: Sequence[Path], side: int) -> list[np.ndarray]:
    """Return the middle of each picture, uint8 [side,side,3]."""
    from dreambooth.data import images

    found = []
    for path in paths:
        picture = images.resize(images.open_image(path), side)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        found.append(images.to_array(picture.crop((left, top, left + side, top + side))))
    return found


def _print(report: Report) -> None:
    print(f"features: {report.features}")
    print(f"{'measure':<20} {'mean':>6}  95 % interval  pictures")
    for name, found in report.measures.items():
        print(f"{name:<20} {found.mean:6.3f}  {found.low:.3f}..{found.high:.3f}   {found.of:>6}")
    if report.frechet_distance is not None:
        print(f"{'frechet_distance':<20} {report.frechet_distance:.4f}")
    for name, why in report.missing.items():
        print(f"{name:<20} not measured: {why}")


def _write(
    settings: EvaluateSettings,
    asked: AskedPrompts,
    info: DatasetInfo,
    drawn: Drawn,
    base: Drawn,
    report: Report,
) -> None:
    from dreambooth.data import images
    from dreambooth.evaluation.shares import finite
    from dreambooth.report import contact_sheet

    document = {
        "model": settings.model,
        "base": settings.base,
        "data": str(settings.data),
        "pictures": settings.pictures,
        "num_inference_steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale,
        "seed": settings.seed,
        "features": report.features,
        "prompts": asdict(asked),
        "measures": {name: asdict(found) for name, found in report.measures.items()},
        "frechet_distance": report.frechet_distance,
        "not_measured": dict(report.missing),
    }
    given = [images.open_image(path) for path in info.instance_images[:SHEET_PICTURES]]
    rows: list[tuple[str, Sequence[Picture]]] = [(f"instance images: {asked.subject}", given)]
    for prompt, pictures in drawn.items():
        rows.append((prompt, finite(pictures)[:SHEET_PICTURES]))
        if prompt in base:
            rows.append((f"base: {prompt}", finite(base[prompt])[:SHEET_PICTURES]))
    try:
        path = settings.out / "evaluation.json"
        path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", "utf-8")
        print(path)
        path = settings.out / "sheet.png"
        contact_sheet.draw(rows, cell=SHEET_CELL_PIXELS).save(path)
        print(path)
    except OSError as error:
        raise ResourceError(
            f"Cannot write to --out {settings.out}: {error.strerror or error}."
        ) from error
