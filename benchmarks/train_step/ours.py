"""Run transfer_learning.py with one setting and collect figures from its files and log lines."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.server_probes import server
from benchmarks.train_step import processes
from benchmarks.train_step.conditions import GIB, Conditions
from benchmarks.train_step.figures import StepTimes, step_times
from benchmarks.train_step.processes import Ended, Line, Memory
from dreambooth.settings.hyperparameters import MEMORY_PLANS
from dreambooth.training.device import DeviceFacts

_BEGINS = re.compile(r"\[([a-z ]+)(?:, step \d+)?\] begins$")
_MODEL_WRITTEN = re.compile(r"the model of step \d+ of \d+ is in ")
_SAMPLED = re.compile(r"(\d+) class images sampled in ([\d.]+) s")
_EXPECTED = re.compile(r"memory: ([\d.]+) ([GM])iB expected by the plan")
_UNITS = {"G": GIB, "M": GIB / 1024}
_PLANS = re.compile(r"^  memory plan +(\w+)|: going on with (\w+)")
BATCH_SIZE = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RunScale:
    """The size of a run: `steps` are measured after the first `warm_up` (>= 1)."""

    steps: int
    warm_up: int
    class_images: int

    @property
    def all_steps(self) -> int:
        """Return the number of steps that a run makes."""
        return self.warm_up + self.steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What our runs and the peer's share: the model folder, pictures, device and conditions."""

    model: Path
    photos: Path
    device: DeviceFacts
    conditions: Conditions = field(default_factory=Conditions)

    @property
    def mixed_precision(self) -> str:
        """Return no, fp16 or bf16, as the device prefers; fp16, with loss scaling, for as_t4."""
        return "fp16" if self.conditions.as_t4 else self.device.mixed_precision


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One row of the table.

    whole_job: with two checkpoints, sample pictures halfway and at the end, compute_fid, and a
    server that is started on the trained model.
    """

    with_prior_preservation: bool
    memory_plan: str
    fast_step: bool = False
    whole_job: bool = False

    @property
    def pictures(self) -> int:
        """Return the pictures per step; prior preservation adds a class image to each instance."""
        return BATCH_SIZE * (2 if self.with_prior_preservation else 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFigures:
    """The figures of one run; times are in seconds.

    first_step_s: from the start of the process to the end of its first step, class images
    included. without_class_images_s: the whole process without the phase that samples them.
    export_s: until the model folder is complete. memory_plan: the one in which the steps were made.
    expected_bytes: what that plan expected at the peak of a step; None if the job had to change its
    plan. checkpoint_s: for one checkpoint. ready_s: until a server with the trained model answers
    /ping.
    """

    times: StepTimes
    memory: Memory | None
    first_step_s: float
    class_image_s: float | None
    export_s: float
    run_s: float
    without_class_images_s: float
    memory_plan: str = ""
    expected_bytes: int | None = None
    checkpoint_s: float | None = None
    ready_s: float | None = None

    @property
    def of_expected(self) -> float | None:
        """Return torch's peak in training / what the memory plan expected; None on a CPU."""
        training = self.memory.phases.get("training") if self.memory else None
        if training is None or training.allocated is None or not self.expected_bytes:
            return None
        return training.allocated / self.expected_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOutcome:
    """The figures of a run, or its fault; class_images: the folder of those that it sampled."""

    setting: Setting
    figures: RunFigures | None
    fault: str | None
    class_images: Path


def settings(device: DeviceFacts, *, quick: bool, only: str | None = None) -> Iterator[Setting]:
    """Yield a setting with and one without prior preservation for each memory plan.

    On a CPU, or when quick, only the first memory plan is used. Otherwise the plans that allow the
    fast step follow a second time, with it. Whole jobs are not among these settings. only: the name
    of one memory plan to use instead of all.
    """
    few = quick or device.kind == "cpu"
    names = [only] if only else list(MEMORY_PLANS)[: 1 if few else None]
    offered = [(name, False) for name in names]
    if not few:
        offered += [(name, True) for name in names if MEMORY_PLANS[name].can_step_fast]
    for name, fast_step in offered:
        for with_prior_preservation in (False, True):
            yield Setting(
                with_prior_preservation=with_prior_preservation,
                memory_plan=name,
                fast_step=fast_step,
            )


def run(setting: Setting, subject: Subject, scale: RunScale, folder: Path) -> RunOutcome:
    """Train in the empty `folder`, where the trained model is left."""
    output = folder / "output"
    arguments = [
        *("--pretrained-model", subject.model, "--train", subject.photos),
        *("--model_dir", folder / "model", "--output_data_dir", output, "--log_level", "info"),
        *("--max_steps", scale.all_steps, "--batch_size", BATCH_SIZE, "--processes", 1),
        *("--memory_plan", setting.memory_plan, "--mixed_precision", subject.mixed_precision),
        *("--with_prior_preservation", setting.with_prior_preservation),
        *("--num_class_images", scale.class_images, "--fast_step", setting.fast_step),
    ]
    if subject.conditions.as_t4:
        arguments += ["--prior_generation_precision", "fp16"]
    if setting.whole_job:
        half = scale.all_steps // 2
        arguments += ["--compute_fid", True, "--sample_steps", half, "--checkpointing_steps", half]
    script = processes.ROOT / "transfer_learning.py"
    ended = processes.run(script, arguments, folder=folder, conditions=subject.conditions)
    fault, figures = ended.fault(), None
    class_images = output / "class_images"
    if fault is None:
        figures = _figures(ended, output, scale)
        # The conditions do not apply to a server, which is a process of its own.
        if setting.whole_job and subject.conditions == Conditions():
            figures = replace(figures, ready_s=_server_ready_s(folder / "model"))
    return RunOutcome(setting=setting, figures=figures, fault=fault, class_images=class_images)


def _server_ready_s(model: Path) -> float:
    began = time.monotonic()
    with server.start(str(model)):
        return time.monotonic() - began


def _figures(ended: Ended, output: Path, scale: RunScale) -> RunFigures:
    first_end = _metrics(output)[0]["time"]
    begins = _begins(ended.lines)
    written = next(line.seconds for line in ended.lines if _MODEL_WRITTEN.search(line.text))
    sampling_s = begins["loading the model"] - begins["class images"]
    plans = [match[1] or match[2] for match in _all(_PLANS, ended.lines)]
    expected = [float(match[1]) * _UNITS[match[2]] for match in _all(_EXPECTED, ended.lines)]
    saving = ended.memory.phases.get("checkpoints") if ended.memory else None
    return RunFigures(
        times=times(output, warm_up=scale.warm_up),
        memory=ended.memory,
        first_step_s=first_end - ended.started_at,
        class_image_s=_seconds_per_class_image(ended.lines),
        export_s=written - begins["export"],
        run_s=ended.seconds,
        without_class_images_s=ended.seconds - sampling_s,
        memory_plan=plans[-1],
        expected_bytes=int(expected[-1]) if expected and len(plans) == 1 else None,
        checkpoint_s=saving.seconds / saving.times if saving else None,
    )


def times(output: Path, *, warm_up: int) -> StepTimes:
    """Return the step times of a run that has written metrics.jsonl into `output`."""
    rows = _metrics(output)
    return step_times(
        [row["time"] for row in rows],
        warm_up=warm_up,
        milliseconds=[1000 / row["steps_per_second"] for row in rows],
    )


def _metrics(output: Path) -> list[dict[str, float]]:
    text = (output / "metrics.jsonl").read_text("utf-8")
    return [json.loads(row) for row in text.splitlines()]


def _all(sign: re.Pattern[str], lines: Sequence[Line]) -> list[re.Match[str]]:
    return [match for line in lines if (match := sign.search(line.text))]


def _begins(lines: Sequence[Line]) -> dict[str, float]:
    """Return the moment at which each phase begins, from the log."""
    found = ((_BEGINS.search(line.text), line.seconds) for line in lines)
    return {match[1]: seconds for match, seconds in found if match}


def _seconds_per_class_image(lines: Sequence[Line]) -> float | None:
    """Return the seconds that the log states, without loading the sampler."""
    return next((float(match[2]) / int(match[1]) for match in _all(_SAMPLED, lines)), None)
