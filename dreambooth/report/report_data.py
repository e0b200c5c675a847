"""Holds the data of a training run's report, and reads metrics.jsonl back."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from dreambooth.settings.hyperparameters import Hyperparameters

Rows = tuple[tuple[str, str], ...]

METER_NAMES = ("subject", "place", "class", "other_class")
"""The names of the prompts of the meter's pictures, in their order."""
METER_SCORES = "scores.json"
_OF_METER = re.compile(rf"step-([0-9]{{6,12}})-({'|'.join(METER_NAMES)})(?:_([0-9]{{1,4}}))?\.png")


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsRow:
    """One line of metrics.jsonl.

    loss: what was minimised, instance and class loss together. class_loss: None without prior
    preservation. seconds: the time of this step, None if unknown. subject_losses: the instance
    loss of those of several subjects that the step has samples of, by their names. kept_loss: of
    the prompts of the base's subjects, None where none is kept. meter: what the meter read after
    the step, by name.
    """

    step: int
    loss: float
    instance_loss: float
    class_loss: float | None
    learning_rate: float
    grad_norm: float
    seconds: float | None
    subject_losses: Mapping[str, float] = field(default_factory=dict)
    kept_loss: float | None = None
    meter: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeterPicture:
    """A picture of the meter. name: of its prompt, one of METER_NAMES or such as "subject_2"."""

    step: int
    name: str
    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class InstancePicture:
    """An instance image. size: (width, height) after the resize, the short side at the resolution.

    offsets: (left, top) of each cached square crop in the resized picture. prompt: the one that it
    is trained with.
    """

    path: Path
    size: tuple[int, int]
    offsets: tuple[tuple[int, int], ...]
    prompt: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """Everything that the page shows. Rows are (name, text), phases (name, seconds).

    instance_prompt, class_prompt, sample_prompt: of several subjects, one after the other.
    stopped: (step, reason) of a run that ended early, or None. kept_step: that of the model which
    early stopping has chosen, None where it is the last one. metrics: in the order of steps.
    last_sample: the picture drawn after the last step. fid_score: None where none was computed.
    scores: those of compute_scores, each with its 95 % interval. step_pictures: (step, file), in
    the order of steps. meter_pictures: by step and prompt; meter_prompts: their prompts by name;
    meter_scores: by step. class_images: all files; the page shows a sample of them. settings: those
    of the run; the page compares them with the defaults.
    seconds: since the job's start, including time outside the phases.
    """

    instance_prompt: str
    class_prompt: str
    sample_prompt: str
    base: str
    finished_at: str
    device: str
    steps: int
    planned_steps: int
    stopped: tuple[int, str] | None
    kept_step: int | None = None
    resolution: int
    metrics: Sequence[MetricsRow]
    last_sample: Image.Image | None
    fid_score: float | None
    scores: Rows
    step_pictures: Sequence[tuple[int, Path]]
    meter_pictures: Sequence[MeterPicture] = ()
    meter_prompts: Mapping[str, str] = field(default_factory=dict)
    meter_scores: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    instance_pictures: Sequence[InstancePicture]
    class_images: Sequence[Path]
    settings: Hyperparameters
    plan: Rows
    phases: Sequence[tuple[str, float]]
    seconds: float
    memory: Rows
    versions: Rows
    data_fingerprint: str
    warnings: Sequence[str]


def read_metrics(path: Path) -> list[MetricsRow]:
    """Return the rows of a metrics.jsonl, also a resumed run's earlier ones; none without the file.

    A line that is no row (cut off when the machine died) is left out.
    """
    rows = []
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    rows.append(_row(json.loads(line)))
                except (ValueError, TypeError, KeyError, AttributeError):
                    continue
    except FileNotFoundError:
        return []
    return rows


def _row(raw: dict[str, Any]) -> MetricsRow:
    speed = float(raw.get("steps_per_second") or 0.0)
    return MetricsRow(
        step=int(raw["step"]),
        loss=float(raw["loss"]),
        instance_loss=float(raw["instance_loss"]),
        class_loss=None if raw["class_loss"] is None else float(raw["class_loss"]),
        learning_rate=float(raw["learning_rate"]),
        grad_norm=float(raw["grad_norm"]),
        seconds=1 / speed if speed > 0 else None,
        kept_loss=None if raw.get("kept_loss") is None else float(raw["kept_loss"]),
        subject_losses={
            str(name): float(loss) for name, loss in dict(raw.get("subject_losses") or {}).items()
        },
        meter={str(name): float(value) for name, value in raw.get("meter", {}).items()},
    )


def meter_pictures(folder: Path) -> list[MeterPicture]:
    """Return the pictures `step-NUMBER-NAME.png` of a folder by step, and there by prompt.

    Those of each subject come before those of the classes.
    """
    found = []
    for path in folder.glob("step-*-*.png"):
        if named := _OF_METER.fullmatch(path.name):
            step, kind, number = int(named[1]), METER_NAMES.index(named[2]), int(named[3] or 1)
            is_class = kind > METER_NAMES.index("place")
            order = (step, is_class, kind, number) if is_class else (step, is_class, number, kind)
            name = path.stem.split("-", 2)[2]
            found.append((order, MeterPicture(step=step, name=name, path=path)))
    return [picture for _, picture in sorted(found, key=lambda one: one[0])]


def meter_scores(folder: Path) -> dict[int, dict[str, float]]:
    """Return the scores of the meter's pictures by step; none where there is no whole file."""
    try:
        raw = json.loads((folder / METER_SCORES).read_text(encoding="utf-8"))
        found = {
            int(step): {str(name): float(value) for name, value in scores.items()}
            for step, scores in raw.items()
        }
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}
    return found if all(_are_shares(scores) for scores in found.values()) else {}


def _are_shares(scores: Mapping[str, float]) -> bool:
    return all(math.isfinite(value) for value in scores.values())


def in_words(scores: Mapping[str, float]) -> str:
    """Return the scores of one step in words."""
    return ", ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in scores.items())
