"""Collect what a training job does, and write its report.html at the end."""

from __future__ import annotations

import contextlib
import logging
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

import accelerate
import diffusers
import PIL
import torch
import transformers
from PIL import Image

import dreambooth
from dreambooth.data import cache, dataset_info, fingerprint, images
from dreambooth.errors import TrainingDivergedError
from dreambooth.evaluation.measures import Measure
from dreambooth.job.task import Task
from dreambooth.limits import size_in_words
from dreambooth.process.memory import is_out_of_memory
from dreambooth.report import page, report_data
from dreambooth.report.report_data import InstancePicture, ReportData, Rows
from dreambooth.report.timings import Timings, peak_memory_bytes
from dreambooth.runs import run_folder
from dreambooth.training import meter_budget
from dreambooth.training import plan as plans
from dreambooth.training.gpu_peaks import GpuPeaks

log = logging.getLogger(__name__)

REPORT_NAME = "report.html"
_SHORTEST_S = 0.001  # shorter phases were skipped, such as class images in a run without them


@dataclass(slots=True, kw_only=True)
class RunReport:
    """Collects what is known only while the job runs: times, pictures, memory, warnings.

    It is a context manager around the job. At its end the report is written if the job is done, has
    diverged or was stopped after a step. Inside it every log line begins with the phase and `step`.

    writes: whether this process writes the report. stopped: a sentence on why the run ended early,
    None where it did not. kept_step: that of the model which early stopping has chosen.
    others_wait: whether the other processes wait for the last file of this one.
    """

    task: Task
    writes: bool = True
    timings: Timings = field(default_factory=Timings)
    gpu_peaks: GpuPeaks = field(default_factory=GpuPeaks)
    class_paths: Sequence[Path] = ()
    last_sample: Image.Image | None = None
    fid_score: float | None = None
    scores: Mapping[str, Measure] = field(default_factory=dict)
    stopped: str | None = None
    kept_step: int | None = None
    others_wait: bool = False
    step: int | None = None
    _warnings: list[str] = field(default_factory=list)
    _warning_collector: _WarningCollector | None = None
    _phase_filter: _PhaseFilter | None = None
    _phases: list[str] = field(default_factory=list)
    _failed: bool = False

    def __enter__(self) -> RunReport:
        if self.writes:  # remove the report of an earlier run
            with contextlib.suppress(OSError):
                (self.task.environment.output_data_dir / REPORT_NAME).unlink()
        self._phase_filter = _PhaseFilter(self)
        for handler in logging.getLogger().handlers:
            handler.addFilter(self._phase_filter)
        self._warning_collector = _WarningCollector(self._warnings)
        logging.getLogger("dreambooth").addHandler(self._warning_collector)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._warning_collector is not None:
            logging.getLogger("dreambooth").removeHandler(self._warning_collector)
        if isinstance(error, TrainingDivergedError):
            self.step, self.stopped = error.step, str(error)
        if self.writes and (error is None or self.stopped is not None):
            self._write()
        if self._phase_filter is not None:
            for handler in logging.getLogger().handlers:
                handler.removeFilter(self._phase_filter)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of the `with` block to this phase, and log that it begins."""
        self._phases.append(name)
        log.log(logging.INFO if len(self._phases) == 1 else logging.DEBUG, "begins")
        try:
            with self.timings.phase(name):
                yield
        except Exception as error:  # it is logged and raised again
            # Out of memory need not end the job: a smaller memory plan may follow, and is logged.
            if not self._failed and not is_out_of_memory(error):
                self._failed = True
                log.info("the job fails here")
            raise
        finally:
            self._phases.pop()

    @property
    def log_prefix(self) -> str:
        """Return the phase, and the step where there is one, for the beginning of a log line."""
        phase = self._phases[-1] if self._phases else "job"
        return phase + (f", step {self.step}" if self.step is not None else "")

    def _write(self) -> None:
        """Write the report; a failure is only logged, because the trained model counts more."""
        folder = self.task.environment.output_data_dir
        try:
            folder.mkdir(parents=True, exist_ok=True)
            page.write(folder / REPORT_NAME, self._report_data(folder))
        except Exception as error:  # a report is not worth failing the job
            log.warning("%s could not be written: %s", REPORT_NAME, error)
            log.debug("what went wrong with the report", exc_info=True)
            return
        log.info("the report is in %s", folder / REPORT_NAME)

    def _report_data(self, folder: Path) -> ReportData:
        task = self.task
        metrics = report_data.read_metrics(folder / "metrics.jsonl")
        return ReportData(
            instance_prompt=" · ".join(each.instance_prompt for each in task.dataset.subjects),
            class_prompt=" · ".join(each.class_prompt for each in task.dataset.class_sets),
            sample_prompt=" · ".join(task.sample_prompts),
            base=task.base_name,
            finished_at=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
            device=task.plan.device.name,
            steps=metrics[-1].step if metrics else 0,
            planned_steps=task.plan.steps,
            stopped=(self.step or 0, self.stopped) if self.stopped is not None else None,
            kept_step=self.kept_step,
            resolution=task.resolution,
            metrics=metrics,
            last_sample=self.last_sample,
            fid_score=self.fid_score,
            scores=tuple(
                (name, f"{one.mean:.3f} ({one.low:.3f} to {one.high:.3f}, {one.of} pictures)")
                for name, one in self.scores.items()
            ),
            step_pictures=_step_pictures(folder / "samples"),
            meter_pictures=report_data.meter_pictures(folder / run_folder.METER),
            meter_prompts=meter_budget.prompts(task.dataset),
            meter_scores=report_data.meter_scores(folder / run_folder.METER),
            instance_pictures=_instance_pictures(task),
            class_images=self.class_paths,
            settings=task.hyperparameters,
            plan=tuple(plans.rows(task.plan, task.hyperparameters)),
            phases=[one for one in self.timings.phases() if one[1] >= _SHORTEST_S],
            seconds=time.monotonic() - task.started,
            memory=_memory(task, self.gpu_peaks),
            versions=versions(),
            data_fingerprint=fingerprint.of_dataset(task.dataset),
            warnings=(
                *task.warnings,
                *task.dataset.warnings,
                *task.plan.warnings,
                *dataset_info.size_warnings(task.dataset, task.resolution),
                *self._warnings,
            ),
        )


class _PhaseFilter(logging.Filter):
    """Adds the phase and the step of the job to each log line."""

    def __init__(self, run_report: RunReport) -> None:
        super().__init__()
        self._run_report = run_report

    def filter(self, record: logging.LogRecord) -> bool:
        record.where = f"[{self._run_report.log_prefix}] "
        return True


class _WarningCollector(logging.Handler):
    """Collects the warnings of our own modules, each one once."""

    def __init__(self, warnings: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._warnings = warnings

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message not in self._warnings:
            self._warnings.append(message)


def versions() -> Rows:
    """Return (name, version) of the software that the result depends on."""
    return (
        ("dreambooth", dreambooth.__version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("diffusers", diffusers.__version__),
        ("transformers", transformers.__version__),
        ("accelerate", accelerate.__version__),
        ("pillow", PIL.__version__),  # decoding and resizing change with it
    )


def _instance_pictures(task: Task) -> tuple[InstancePicture, ...]:
    """Return the instance images with the crops that `cache.build` has chosen.

    Crops are a function of the seed and the picture's number, so they are computed again here.
    """
    settings, found = task.hyperparameters, []
    dataset = task.dataset
    rows = zip(dataset.instance_images, dataset.instance_facts, dataset.prompts, strict=True)
    for number, (path, facts, prompt) in enumerate(rows):
        size = images.resized_size(facts.width, facts.height, task.resolution)
        offsets = cache.crop_boxes(
            size,
            resolution=task.resolution,
            center=settings.center_crop,
            crops_per_picture=task.plan.cached_crops,
            seed=settings.seed,
            stream="instance",
            key=number,
        )
        found.append(InstancePicture(path=path, size=size, offsets=tuple(offsets), prompt=prompt))
    return tuple(found)


def _step_pictures(folder: Path) -> tuple[tuple[int, Path], ...]:
    """Return (step, file) of the pictures samples/step-000123.png, sorted by step."""
    found = [
        (int(path.stem.removeprefix("step-")), path)
        for path in folder.glob("step-*.png")
        if path.stem.removeprefix("step-").isdecimal()
    ]
    return tuple(sorted(found))


def _memory(task: Task, peaks: GpuPeaks) -> Rows:
    rows = [("peak memory", size_in_words(peak_memory_bytes()))]
    if task.device.type == "cuda":
        rows += [
            ("peak GPU memory, reserved", size_in_words(peaks.whole.reserved)),
            ("peak GPU memory, allocated in training", size_in_words(peaks.training.allocated)),
        ]
    where = "GPU memory" if task.device.type == "cuda" else "training memory"
    expected = task.plan.memory_bytes
    words = size_in_words(expected) if expected else "unknown"
    rows.append((f"{where} expected by the plan", words))
    return tuple(rows)
