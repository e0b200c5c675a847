"""`python -m dreambooth evaluate` measures what a fine-tuned model draws and what it has kept.

It draws with the served defaults, compares the pictures by their features (a table of
docs/measurements.md says how), prints a table and writes evaluation.json and a contact sheet.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dreambooth.data import dataset_info, prompts
from dreambooth.data.dataset_info import DatasetInfo
from dreambooth.errors import ResourceError, UserError
from dreambooth.evaluation import prompt_list, vision_model
from dreambooth.process import gpu_driver, libraries, temporary_folder
from dreambooth.settings.evaluate_options import EvaluateSettings, read

if TYPE_CHECKING:
    import numpy as np
    import torch

    from dreambooth.diffusion.model import DiffusionModel
    from dreambooth.evaluation.features import FeatureNetwork
    from dreambooth.evaluation.measures import Features, Measure, Values
    from dreambooth.evaluation.text_image import TextImage
    from dreambooth.report.contact_sheet import Picture

log = logging.getLogger(__name__)

SHEET_CELL_PIXELS = 128
SHEET_PICTURES = 8  # of each prompt
_DRAWING = ("pictures", "num_inference_steps", "guidance_scale", "seed", "batch_size")

_NO_CLASS_PICTURES = "it needs --base, or class images beside the data's pictures"
_NOT_FINITE = "no picture of it is finite"

Drawn = Mapping[str, "Sequence[np.ndarray]"]
"""Finite pictures, uint8 [H,W,3], by prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedPrompts:
    """The prompts that are drawn. classes: of the subject's class and another one, if known."""

    subject: str
    elsewhere: tuple[str, ...]
    own_class: str | None
    other_class: str

    @property
    def of_classes(self) -> tuple[str, ...]:
        """Return the prompts that the base model draws too."""
        return tuple(prompt for prompt in (self.own_class, self.other_class) if prompt)

    @property
    def all(self) -> tuple[str, ...]:
        """Return all prompts, each once."""
        return tuple(dict.fromkeys((self.subject, *self.elsewhere, *self.of_classes)))


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenFeatures:
    """The features of pictures, each [N,D] and of length 1: of drawings by their prompts.

    flipped: of the instance images' mirror images. class_pictures: drawn by the base, or given.
    """

    instance: Features
    flipped: Features
    drawn: Mapping[str, Features]
    base: Mapping[str, Features]
    class_pictures: Features | None


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

        from dreambooth.evaluation import features, text_image

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
        del model
        if settings.base is not None:
            other = _load(settings.base, "--base", settings, device, workspace / "base")
            base = draw(other, asked.of_classes, "drawing, base model", **how)
    report = _measure(asked, info, drawn, base, network, reader, side)
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
) -> dict[str, list[np.ndarray]]:
    """Return the finite pictures of each prompt; picture i of each starts from seed + i.

    label: what the line of progress says.
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
    drawn: dict[str, list[np.ndarray]] = {prompt: [] for prompt in prompts}
    made = sampling.generate(model, requests, batch_size=batch_size)
    with Progress(len(requests), label, stream=sys.stderr, unit="pictures") as progress:
        for number, (request, picture) in enumerate(zip(requests, made, strict=True)):
            if picture is None:
                log.warning("a picture of seed %s is not finite and left out", request.seed)
            else:
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
    side: int,
) -> Report:
    import numpy as np

    from dreambooth.evaluation import scores
    from dreambooth.evaluation.measures import of_length_one, summarised

    given = _squared(info.instance_images, side)
    instance = network(given)
    raw = {prompt: network(pictures) for prompt, pictures in drawn.items() if pictures}
    own = {prompt: network(pictures) for prompt, pictures in base.items() if pictures}
    gallery = own.get(asked.own_class or "")
    if gallery is None and info.class_images:
        gallery = network(_squared(info.class_images, side))
    seen = SeenFeatures(
        instance=of_length_one(instance),
        flipped=of_length_one(network([np.ascontiguousarray(one[:, ::-1]) for one in given])),
        drawn={prompt: of_length_one(rows) for prompt, rows in raw.items()},
        base={prompt: of_length_one(rows) for prompt, rows in own.items()},
        class_pictures=None if gallery is None else of_length_one(gallery),
    )
    found = dict(_of_the_subject(asked, seen)) | dict(_of_classes(asked, seen))
    fits = [reader.fit(drawn[p], p) for p in asked.elsewhere if drawn[p]] if reader else []
    found["context"] = np.concatenate(fits) if fits else "it needs --text_image, a CLIP model"
    mine = raw.get(asked.subject, instance[:0])
    return Report(
        measures={n: summarised(each) for n, each in found.items() if not isinstance(each, str)},
        missing={name: each for name, each in found.items() if isinstance(each, str)},
        frechet_distance=(
            scores.frechet_distance(instance, mine) if min(len(instance), len(mine)) > 1 else None
        ),
        features=network.name,
    )


def _of_the_subject(asked: AskedPrompts, seen: SeenFeatures) -> Iterator[tuple[str, Values | str]]:
    """Yield each measure of the subject's drawings, or why there is none."""
    from dreambooth.evaluation import measures

    drawn = seen.drawn.get(asked.subject)
    if drawn is None:
        yield "subject", _NOT_FINITE
        return
    if seen.class_pictures is None:
        yield "subject", _NO_CLASS_PICTURES
    else:
        yield "subject", measures.subject_rank(drawn, seen.instance, seen.class_pictures)
    yield "likeness", measures.likeness(drawn, seen.instance)
    yield "copies", measures.copied(drawn, seen.instance, seen.flipped)


def _of_classes(asked: AskedPrompts, seen: SeenFeatures) -> Iterator[tuple[str, Values | str]]:
    """Yield each measure of what was kept, or why there is none."""
    from dreambooth.evaluation import measures

    drawn = seen.drawn.get(asked.own_class or "")
    if asked.own_class is None:
        yield "class_kept", "dataset_info.json gives no class_prompt"
    elif drawn is None:
        yield "class_kept", _NOT_FINITE
    else:
        if seen.class_pictures is None:
            yield "class_kept", _NO_CLASS_PICTURES
        else:
            yield "class_kept", measures.kept(drawn, seen.instance, seen.class_pictures)
        yield "class_likeness", measures.likeness(drawn, seen.instance)
        for name, rows in (
            ("class_variety", drawn),
            ("base_class_variety", seen.base.get(asked.own_class, drawn[:0])),
        ):
            if len(rows) > 1:
                yield name, measures.variety(rows)
    drawn, own = (rows.get(asked.other_class) for rows in (seen.drawn, seen.base))
    if drawn is None or own is None:
        yield "other_class_kept", "it needs --base" if drawn is not None else _NOT_FINITE
    else:
        yield "other_class_kept", measures.kept(drawn, seen.instance, own)


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
        rows.append((prompt, pictures[:SHEET_PICTURES]))
        if base.get(prompt):
            rows.append((f"base: {prompt}", base[prompt][:SHEET_PICTURES]))
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
