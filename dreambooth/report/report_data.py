"""Holds the data of a training run's report, and reads metrics.jsonl back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dreambooth.settings.hyperparameters import Hyperparameters

Rows = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsRow:
    """One line of metrics.jsonl.

    loss: what was minimised, instance and class loss together. class_loss: None without prior
    preservation. seconds: the time of this step, None if unknown.
    """

    step: int
    loss: float
    instance_loss: float
    class_loss: float | None
    learning_rate: float
    grad_norm: float
    seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class InstancePicture:
    """An instance image. size: (width, height) after the resize, the short side at the resolution.

    offsets: (left, top) of each cached square crop in the resized picture.
    """

    path: Path
    size: tuple[int, int]
    offsets: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """Everything that the page shows. Rows are (name, text), phases (name, seconds).

    stopped: (step, reason) of a run that ended early, or None. metrics: in the order of steps.
    last_sample: the picture drawn after the last step. fid_score: None where none was computed.
    scores: those of compute_scores, each with its 95 % interval. step_pictures: (step, file), in
    the order of steps. class_images: all files; the page shows a sample of them. settings: those of
    the run; the page compares them with the defaults.
    seconds: since the job's start, including time outside the phases.
    """

    instance_prompt: str
    class_prompt: str | None
    sample_prompt: str
    base: str
    finished_at: str
    device: str
    steps: int
    planned_steps: int
    stopped: tuple[int, str] | None
    resolution: int
    metrics: Sequence[MetricsRow]
    last_sample: Image.Image | None
    fid_score: float | None
    scores: Rows
    step_pictures: Sequence[tuple[int, Path]]
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


def _row(raw: dict[str, float]) -> MetricsRow:
    speed = float(raw.get("steps_per_second") or 0.0)
    return MetricsRow(
        step=int(raw["step"]),
        loss=float(raw["loss"]),
        instance_loss=float(raw["instance_loss"]),
        class_loss=None if raw["class_loss"] is None else float(raw["class_loss"]),
        learning_rate=float(raw["learning_rate"]),
        grad_norm=float(raw["grad_norm"]),
        seconds=1 / speed if speed > 0 else None,
    )
