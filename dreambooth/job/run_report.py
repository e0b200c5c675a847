"""Listens to a training job and writes its report.html in the end."""

from __future__ import annotations

import contextlib
import logging
import platform
import time
from collections.abc import Iterator, Sequence
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
from dreambooth.job.task import Task
from dreambooth.report import page, report_data
from dreambooth.report.report_data import InstancePicture, ReportData, Rows
from dreambooth.report.timings import Timings, peak_memory_bytes
from dreambooth.training import plan as plans
from dreambooth.training.gpu_peaks import GpuPeaks

log = logging.getLogger(__name__)

REPORT_NAME = "report.html"
_SHORTEST_S = 0.001  # what was skipped, such as class images of a run without them, is no phase
_GIB = 2**30


@dataclass(slots=True, kw_only=True)
class RunReport:
    """Collects what only the running job knows: times, class images, the last picture, warnings.

    A context manager around the job; the report is written when the job is done, has diverged or
    was `stopped` (a sentence) after steps were made, by the process that `writes`. Meanwhile every
    log line begins with the phase and the `step`.
    """

    task: Task
    writes: bool = True
    timings: Timings = field(default_factory=Timings)
    gpu_peaks: GpuPeaks = field(default_factory=GpuPeaks)
    class_paths: Sequence[Path] = ()
    final: Image.Image | None = None
    fid_score: float | None = None
    stopped: str | None = None
    step: int | None = None
    _warnings: list[str] = field(default_factory=list)
    _listener: _Listener | None = None
    _where: _Where | None = None
    _phases: list[str] = field(default_factory=list)
    _failed: bool = False

    def __enter__(self) -> RunReport:
        if self.writes:  # what lies there is of an earlier run
            with contextlib.suppress(OSError):
                (self.task.environment.output_data_dir / REPORT_NAME).unlink()
        self._where = _Where(self)
        for handler in logging.getLogger().handlers:
            handler.addFilter(self._where)
        self._listener = _Listener(self._warnings)
        logging.getLogger("dreambooth").addHandler(self._listener)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._listener is not None:
            logging.getLogger("dreambooth").removeHandler(self._listener)
        if isinstance(error, TrainingDivergedError):
            self.step, self.stopped = error.step, str(error)
        if self.writes and (error is None or self.stopped is not None):
            self._write()
        if self._where is not None:
            for handler in logging.getLogger().handlers:
                handler.removeFilter(self._where)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of the `with` block to this phase, and say so in the log."""
        self._phases.append(name)
        log.log(logging.INFO if len(self._phases) == 1 else logging.DEBUG, "begins")
        try:
            with self.timings.phase(name):
                yield
        except Exception as error:
            # Out of memory may still go on by a smaller plan; its own line says so.
            if not self._failed and not isinstance(error, torch.OutOfMemoryError):
                self._failed = True
                log.info("the job fails here")
            raise
        finally:
            self._phases.pop()

    @property
    def where(self) -> str:
        """The phase, and the step where there is one, as log lines begin with them."""
        phase = self._phases[-1] if self._phases else "job"
        return phase + (f", step {self.step}" if self.step is not None else "")

    def _write(self) -> None:
        """Write the report as well as it can be: it must not cost the job a trained model."""
        folder = self.task.environment.output_data_dir
        try:
            folder.mkdir(parents=True, exist_ok=True)
            page.write(folder / REPORT_NAME, self._report_data(folder))
        except Exception as error:  # a page is not worth a job
            log.warning("%s could not be written: %s", REPORT_NAME, error)
            log.debug("what went wrong with the report", exc_info=True)
            return
        log.info("the report is in %s", folder / REPORT_NAME)

    def _report_data(self, folder: Path) -> ReportData:
        task = self.task
        metrics = report_data.read_metrics(folder / "metrics.jsonl")
        return ReportData(
            instance_prompt=task.dataset.instance_prompt,
            class_prompt=task.dataset.class_prompt,
            sample_prompt=task.sample_prompt,
            base=task.base_name,
            finished_at=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
            device=task.plan.device.name,
            steps=metrics[-1].step if metrics else 0,
            planned_steps=task.plan.steps,
            stopped=(self.step or 0, self.stopped) if self.stopped is not None else None,
            resolution=task.resolution,
            metrics=metrics,
            final=self.final,
            fid_score=self.fid_score,
            step_pictures=_step_pictures(folder / "samples"),
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


class _Where(logging.Filter):
    """Tells the log's formatter where the job is."""

    def __init__(self, run_report: RunReport) -> None:
        super().__init__()
        self._run_report = run_report

    def filter(self, record: logging.LogRecord) -> bool:
        record.where = f"[{self._run_report.where}] "
        return True


class _Listener(logging.Handler):
    """Keeps each warning of the job's own modules once."""

    def __init__(self, warnings: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._warnings = warnings

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message not in self._warnings:
            self._warnings.append(message)


def versions() -> Rows:
    """(name, version) of what the result depends on."""
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
    """The crops as `cache.build` chose them: a function of the seed and the picture's number."""
    settings, found = task.hyperparameters, []
    pairs = zip(task.dataset.instance_images, task.dataset.instance_facts, strict=True)
    for number, (path, facts) in enumerate(pairs):
        size = images.resized_size(facts.width, facts.height, task.resolution)
        offsets = cache.crop_boxes(
            size,
            resolution=task.resolution,
            center=settings.center_crop,
            crops=task.plan.cached_crops,
            seed=settings.seed,
            stream="instance",
            key=number,
        )
        found.append(InstancePicture(path=path, size=size, offsets=tuple(offsets)))
    return tuple(found)


def _step_pictures(folder: Path) -> tuple[tuple[int, Path], ...]:
    """(step, file) of samples/step-000123.png, ascending."""
    found = [
        (int(path.stem.removeprefix("step-")), path)
        for path in folder.glob("step-*.png")
        if path.stem.removeprefix("step-").isdecimal()
    ]
    return tuple(sorted(found))


def _memory(task: Task, peaks: GpuPeaks) -> Rows:
    rows = [("peak memory", _size(peak_memory_bytes()))]
    if task.device.type == "cuda":
        rows += [
            ("peak GPU memory, reserved", _size(peaks.whole.reserved)),
            ("peak GPU memory, allocated in training", _size(peaks.training.allocated)),
        ]
    where = "GPU memory" if task.device.type == "cuda" else "training memory"
    rows.append((f"{where} expected by the plan", _size(task.plan.memory_bytes)))
    return tuple(rows)


def _size(count: int) -> str:
    if count <= 0:
        return "unknown"
    return f"{count / _GIB:.2f} GiB" if count >= _GIB / 10 else f"{count / 2**20:.0f} MiB"
