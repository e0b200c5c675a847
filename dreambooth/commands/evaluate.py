"""`python -m dreambooth evaluate` measures what a fine-tuned model draws and what it has kept.

It draws with the served defaults, compares the pictures by their features (a table of
docs/measurements.md says how), prints a table and writes evaluation.json and a contact sheet.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dreambooth.data import dataset_info, prompts
from dreambooth.data.dataset_info import DatasetInfo, SubjectData
from dreambooth.data.picture_files import printable
from dreambooth.errors import ResourceError, UserError, quoted
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
    """What was measured of one subject. missing: why a measure is not there, by its name."""

    subject: SubjectData
    asked: AskedPrompts
    measures: Mapping[str, Measure]
    frechet_distance: float | None
    missing: Mapping[str, str]

    @property
    def document(self) -> dict[str, object]:
        """Return what evaluation.json says of the subject."""
        return {
            "prompts": asdict(self.asked),
            "measures": {name: asdict(found) for name, found in self.measures.items()},
            "frechet_distance": self.frechet_distance,
            "not_measured": dict(self.missing),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Confusion:
    """Whether the model tells several subjects apart: `confusion.matrix` and `collapse_rate`."""

    matrix: Values
    collapse_rate: float


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
    asked = [_asked_prompts(settings, subject) for subject in info.subjects]
    all_prompts = list(dict.fromkeys(prompt for each in asked for prompt in each.all))
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
        drawn = (
            _read_drawn(settings.drawn, "--drawn", all_prompts)
            if settings.drawn is not None
            else draw(model, all_prompts, "drawing", **how)
        )
        base: Drawn = {}
        base_loss = None
        del model
        if settings.base is not None:
            other = _load(settings.base, "--base", settings, device, workspace / "base")
            base = (
                _read_drawn(settings.base_drawn, "--base_drawn", all_prompts)
                if settings.base_drawn is not None
                else draw(other, all_prompts, "drawing, base model", **how)
            )
            base_loss = functools.partial(clean.denoising_loss, other)
        reports = [
            _measure(one, info, subject, drawn, base, network, reader, base_loss, side)
            for one, subject in zip(asked, info.subjects, strict=True)
        ]
        confused = _confusion(reports, drawn, network, side) if info.are_several else None
    _print(reports, network.name, confused)
    _write(settings, drawn, base, reports, network.name, confused)
    return 0


def _read_data(folder: Path) -> DatasetInfo:
    inside = "give that folder with --data"
    found = prompts.read(folder, with_prior_preservation=False, inside=inside)
    with_class = all(each.class_prompt is not None for each in found.subjects)
    info = dataset_info.read(
        folder, with_prior_preservation=with_class, given="with --data", inside=inside
    )
    for warning in info.warnings:
        log.warning(warning)
    return info


def _asked_prompts(settings: EvaluateSettings, subject: SubjectData) -> AskedPrompts:
    elsewhere: tuple[str, ...] = (f"{subject.instance_prompt} on a beach",)
    if settings.prompts is not None:
        elsewhere = prompt_list.read(
            settings.prompts,
            instance_prompt=subject.instance_prompt,
            class_prompt=subject.class_prompt,
        )
    is_cat = "cat" in (subject.class_prompt or subject.instance_prompt).lower().split()
    return AskedPrompts(
        subject=subject.instance_prompt,
        elsewhere=elsewhere,
        own_class=subject.class_prompt,
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


def _read_drawn(folder: Path, option: str, prompts: Sequence[str]) -> Drawn:
    """Return the pictures that `generate` has written, by their prompts, which stand in them."""
    from dreambooth.data import images

    found: dict[str, list[np.ndarray | None]] = {prompt: [] for prompt in prompts}
    for path in sorted(folder.glob("*.png")):
        prompt = images.read_note(path, "prompt")
        if prompt in found:  # the grid has none
            found[prompt].append(images.to_array(images.open_image(path)))
    missing = [prompt for prompt in prompts if not found[prompt]]
    if missing:
        raise UserError(f"{option} {folder} holds no picture of the prompt {quoted(missing[0])}.")
    return found


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
    subject: SubjectData,
    drawn: Drawn,
    base: Drawn,
    network: FeatureNetwork,
    reader: TextImage | None,
    base_loss: Callable[[Sequence[np.ndarray]], Values] | None,
    side: int,
) -> Report:
    from dreambooth.evaluation import scores, shares
    from dreambooth.evaluation.measures import summarised

    class_images = [
        path
        for each in info.class_sets
        for path in each.images
        if each.class_prompt == subject.class_prompt and not base
    ]
    pictures = shares.MeasuredPictures(
        instance=_squared(subject.instance_images, side),
        drawn={prompt: drawn[prompt] for prompt in asked.all},
        base={prompt: base[prompt] for prompt in asked.all if prompt in base},
        class_images=_squared(class_images, side),
    )
    found = shares.measured(asked, pictures, network, reader, base_loss)
    mine = shares.finite(drawn[asked.subject])
    return Report(
        subject=subject,
        asked=asked,
        measures={n: summarised(each) for n, each in found.items() if not isinstance(each, str)},
        missing={name: each for name, each in found.items() if isinstance(each, str)},
        frechet_distance=(
            scores.frechet_distance(network(pictures.instance), network(mine))
            if min(len(pictures.instance), len(mine)) > 1
            else None
        ),
    )


def _confusion(
    reports: Sequence[Report], drawn: Drawn, network: FeatureNetwork, side: int
) -> Confusion:
    """Rank the instance images of all subjects for each drawing of an instance prompt."""
    import numpy as np

    from dreambooth.evaluation import confusion, shares
    from dreambooth.evaluation.measures import of_length_one

    pictures = [shares.finite(drawn[each.asked.subject]) for each in reports]
    matrix = confusion.matrix(
        [of_length_one(network(row)) if row else np.empty((0, 1)) for row in pictures],
        [of_length_one(network(_squared(one.subject.instance_images, side))) for one in reports],
    )
    return Confusion(matrix=matrix, collapse_rate=confusion.collapse_rate(matrix))


def _squared(paths: Sequence[Path], side: int) -> list[np.ndarray]:
    """Return the middle of each picture, uint8 [side,side,3]."""
    from dreambooth.data import images

    found = []
    for path in paths:
        picture = images.resize(images.open_image(path), side)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        found.append(images.to_array(picture.crop((left, top, left + side, top + side))))
    return found


def _print(reports: Sequence[Report], features: str, confused: Confusion | None) -> None:
    print(f"features: {features}")
    for report in reports:
        if confused is not None:
            print(f"\n{printable(report.subject.name)}: {printable(report.asked.subject)}")
        print(f"{'measure':<20} {'mean':>6}  95 % interval  pictures")
        for name, found in report.measures.items():
            interval = f"{found.low:.3f}..{found.high:.3f}"
            print(f"{name:<20} {found.mean:6.3f}  {interval}   {found.of:>6}")
        if report.frechet_distance is not None:
            print(f"{'frechet_distance':<20} {report.frechet_distance:.4f}")
        for name, why in report.missing.items():
            print(f"{name:<20} not measured: {why}")
    if confused is None:
        return
    names = [printable(report.subject.name)[:20] for report in reports]
    print("\nshare of the drawings of each subject (rows) that come nearest to each (columns)")
    print(f"{'':<20}", *(f"{name:>12}" for name in names))
    for name, row in zip(names, confused.matrix, strict=True):
        print(f"{name:<20}", *(f"{share:12.3f}" for share in row))
    print(f"{'collapse_rate':<20} {confused.collapse_rate:12.3f}")


def _write(
    settings: EvaluateSettings,
    drawn: Drawn,
    base: Drawn,
    reports: Sequence[Report],
    features: str,
    confused: Confusion | None,
) -> None:
    from dreambooth.data import images
    from dreambooth.evaluation.shares import finite
    from dreambooth.report import contact_sheet

    document: dict[str, object] = {
        "model": settings.model,
        "base": settings.base,
        "data": str(settings.data),
        "features": features,
    }
    if settings.drawn is None:
        document |= {
            "pictures": settings.pictures,
            "num_inference_steps": settings.num_inference_steps,
            "guidance_scale": settings.guidance_scale,
            "seed": settings.seed,
        }
    if confused is None:
        document |= reports[0].document
    else:
        document |= {
            "subjects": {report.subject.name: report.document for report in reports},
            "confusion": [
                [share if math.isfinite(share) else None for share in row.tolist()]
                for row in confused.matrix
            ],
            "collapse_rate": (
                confused.collapse_rate if math.isfinite(confused.collapse_rate) else None
            ),
        }
    rows: list[tuple[str, Sequence[Picture]]] = []
    for report in reports:
        shown = report.subject.instance_images[:SHEET_PICTURES]
        label = f"instance images: {report.asked.subject}"
        rows.append((label, [images.open_image(path) for path in shown]))
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
