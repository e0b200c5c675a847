"""Run a peer's script on the same work: diffusers' `train_dreambooth.py`, which the user provides.

Its options set what is trained and for how long; all others keep their defaults. Options and
progress bar ("Steps: ... 12/400 [") are those of the script published with diffusers 0.42.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.train_step import processes
from benchmarks.train_step.figures import StepTimes, step_times
from benchmarks.train_step.ours import BATCH_SIZE, RunOutcome, RunScale, Subject
from benchmarks.train_step.processes import Line, Memory
from dreambooth.model_folder.facts import read_facts

_PROGRESS = re.compile(r"^Steps:.*?(\d+)/(\d+) \[")
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerFigures:
    """The figures of the peer's run, as in `ours.RunFigures`; it samples no class images."""

    times: StepTimes
    memory: Memory | None
    first_step_s: float
    run_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerOutcome:
    """The figures of the peer's run, or its fault."""

    figures: PeerFigures | None
    fault: str | None


def needs_stand_in() -> bool:
    """Return whether torchvision is missing, from which the script takes its transforms."""
    return importlib.util.find_spec("torchvision") is None


def run(
    script: Path, ours: RunOutcome, subject: Subject, scale: RunScale, folder: Path
) -> PeerOutcome:
    """Train in the empty `folder` what `ours` trained, with the class images that it sampled."""
    ended = processes.run(
        script,
        arguments(ours, subject, scale, folder),
        folder=folder,
        conditions=replace(subject.conditions, stand_in=needs_stand_in()),
    )
    ends = step_ends(ended.lines, scale.all_steps)
    fault = ended.fault()
    if fault is None and len(ends) < scale.all_steps:
        fault = f"its progress bar told {len(ends)} of {scale.all_steps} steps"
    if fault is not None:
        return PeerOutcome(figures=None, fault=fault)
    figures = PeerFigures(
        times=step_times(ends, warm_up=scale.warm_up),
        memory=ended.memory,
        first_step_s=ends[0],
        run_s=ended.seconds,
    )
    return PeerOutcome(figures=figures, fault=None)


def arguments(ours: RunOutcome, subject: Subject, scale: RunScale, folder: Path) -> list[object]:
    """Return the script's arguments.

    The pictures are copied to folders of their own, because the script opens every file it finds.
    """
    prompts = json.loads((subject.photos / "dataset_info.json").read_text("utf-8"))
    words: list[object] = [
        *("--pretrained_model_name_or_path", subject.model),
        *("--instance_data_dir", _pictures_alone(subject.photos, folder / "instance")),
        *("--instance_prompt", prompts["instance_prompt"]),
        *("--output_dir", folder / "model"),
        *("--resolution", read_facts(subject.model).resolution),
        *("--train_batch_size", BATCH_SIZE),
        *("--max_train_steps", scale.all_steps),
        *("--mixed_precision", subject.mixed_precision),
    ]
    if ours.setting.with_prior_preservation:
        words += ["--with_prior_preservation", "--class_prompt", prompts["class_prompt"]]
        words += ["--class_data_dir", _pictures_alone(ours.class_images, folder / "class")]
        words += ["--num_class_images", scale.class_images]
    return words


def step_ends(lines: Sequence[Line], steps: int) -> list[float]:
    """Return the moment at which the progress bar of `steps` steps first showed each step.

    The moment of a step that the bar skipped is interpolated. Without such a bar the list is empty.
    """
    ends: list[float] = []
    for line in lines:
        found = _PROGRESS.search(line.text)
        if found is None or int(found[2]) != steps or int(found[1]) <= len(ends):
            continue
        passed = int(found[1]) - len(ends)
        before = ends[-1] if ends else line.seconds
        ends += [before + (line.seconds - before) * (n + 1) / passed for n in range(passed)]
    return ends


def _pictures_alone(source: Path, copy: Path) -> Path:
    copy.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        if path.suffix.lower() in _PICTURES:
            shutil.copy(path, copy)
    return copy
