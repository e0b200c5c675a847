"""Logs a training run: progress, metrics.jsonl, loss per epoch and sample pictures."""

from __future__ import annotations

import io
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from PIL import Image

from dreambooth.errors import one_line
from dreambooth.process import files, logs
from dreambooth.process.progress import Progress
from dreambooth.report import report_data
from dreambooth.training.meter import MeterReading
from dreambooth.training.plan import TrainingPlan
from dreambooth.training.step_metrics import StepMetrics

log = logging.getLogger(__name__)

_OUR_SAMPLES = "step-[0-9][0-9][0-9][0-9][0-9][0-9]*.png"


class RunLog:
    """Logs the metrics of each step; used as a context manager around the loop.

    A resumed run continues metrics.jsonl after removing the rows that follow its checkpoint. A
    fresh run clears the metrics, sample pictures and meter's pictures of an earlier one.
    read_meter: returns a reading if one is due after a step. after_reading: is called once its row
    is written. elsewhere: how the user chooses another folder, for messages.
    """

    def __init__(
        self,
        folder: Path,
        plan: TrainingPlan,
        *,
        first_step: int,
        stream: TextIO,
        sample_steps: int = 0,
        draw_sample: Callable[[], Image.Image | None] = lambda: None,
        read_meter: Callable[[int], MeterReading | None] = lambda step: None,
        after_reading: Callable[[], None] = lambda: None,
        elsewhere: str = "give another folder",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = folder
        self._plan = plan
        self._sample_steps = sample_steps
        self._draw_sample = draw_sample
        self._read_meter, self._after_reading = read_meter, after_reading
        self._elsewhere = elsewhere
        self._clock = clock
        with self._disk_faults_named():
            folder.mkdir(parents=True, exist_ok=True)
            self._metrics = _open_metrics(folder / "metrics.jsonl", first_step)
            with ExitStack() as undo:
                undo.callback(self._metrics.close)
                for old in _of_an_earlier_run(folder) if first_step == 0 else ():
                    old.unlink()
                self._tensorboard = _tensorboard(folder, first_step)
                undo.pop_all()
        self._progress = Progress(plan.steps, "training", stream=stream, initial=first_step)
        self._epoch_losses: list[float] = []
        self._subject_losses: dict[str, list[float]] = {}  # of the epoch, by subject
        self._last_time = clock()
        self._seconds, self._read_until = 0.0, 0  # per step; the last step read so far

    def __enter__(self) -> RunLog:
        self._last_time = self._clock()  # what came before is no part of the first step's time
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.close()
        # Each row was flushed when it was written, so an error in closing loses nothing.
        with suppress(OSError):
            self._metrics.close()
        if self._tensorboard is not None:
            with suppress(OSError):
                self._tensorboard.close()

    def step(self, metrics: StepMetrics) -> None:
        """Show and write one step's metrics; draw a sample picture if one is due."""
        if metrics.step > self._read_until:  # steps that are read together share their time evenly
            now = self._clock()
            self._seconds = max(now - self._last_time, 1e-9) / metrics.read_with
            self._last_time = now
            self._read_until = metrics.step + metrics.read_with - 1
        row = asdict(metrics)
        del row["read_with"]
        row["subject_losses"] = dict(metrics.subject_losses)
        for name in ("subject_losses", "kept_loss"):  # only where there is one
            if not getattr(metrics, name) and getattr(metrics, name) != 0:
                del row[name]
        row["steps_per_second"] = round(1.0 / self._seconds, 4)
        row["time"] = round(time.time() - (self._read_until - metrics.step) * self._seconds, 3)
        reading = self._read_meter(metrics.step)
        if reading is not None:
            row["meter"] = reading.figures()
        with self._disk_faults_named():
            self._metrics.write(json.dumps(row) + "\n")
            self._metrics.flush()
        self._progress.update(
            metrics.step, loss=metrics.loss, learning_rate=f"{metrics.learning_rate:.2e}"
        )
        if self._tensorboard is not None:
            _add_events(self._tensorboard, row)
        self._count_epoch(metrics)
        draws = self._shows(metrics.step) and metrics.step < self._plan.steps
        if draws:
            self._save_sample(metrics.step, self._draw_sample())
        if reading is not None:
            self._after_reading()
        # What is done here does not count as a step's time. Steps that are read together are
        # written while the device computes on, so there only drawing and the meter are left out.
        if draws or reading is not None or metrics.read_with == 1:
            self._last_time = self._clock()

    def add_last_sample(self, picture: Image.Image | None, *, step: int) -> None:
        """Save the last picture if one is due; it is drawn after the model of `step` is written.

        Raises ResourceError where the disk is full.
        """
        if self._shows(self._plan.steps):
            self._save_sample(step, picture)

    def finish(self, average_loss: float) -> None:
        """Print the last line that SageMaker's metric definitions read.

        average_loss: the mean over all steps.
        """
        logs.metric(f"End of training: train_avg_loss={plain_decimal(average_loss)}")

    def _count_epoch(self, metrics: StepMetrics) -> None:
        self._epoch_losses.append(metrics.loss)
        for subject, loss in metrics.subject_losses:
            self._subject_losses.setdefault(subject, []).append(loss)
        epoch = math.floor(metrics.epoch + 1e-9)
        if epoch > math.floor(self._plan.epoch(metrics.step - 1) + 1e-9):
            average = sum(self._epoch_losses) / len(self._epoch_losses)
            logs.metric(f"End epoch {epoch}: train_avg_loss={plain_decimal(average)}")
            self._epoch_losses.clear()
            if self._subject_losses:
                means = {name: sum(all_) / len(all_) for name, all_ in self._subject_losses.items()}
                named = ", ".join(f"{one_line(name)} {mean:.4f}" for name, mean in means.items())
                log.info("instance loss of each subject in epoch %d: %s", epoch, named)
                self._subject_losses.clear()

    def _shows(self, step: int) -> bool:
        return self._sample_steps > 0 and step % self._sample_steps == 0

    def _save_sample(self, step: int, picture: Image.Image | None) -> None:
        if picture is None:
            return
        path = self._folder / "samples" / f"step-{step:06d}.png"
        with self._disk_faults_named():
            path.parent.mkdir(exist_ok=True)
            png = io.BytesIO()
            picture.save(png, "PNG")
            files.write_whole(path, png.getvalue())

    def _disk_faults_named(self) -> AbstractContextManager[None]:
        return files.disk_faults_named(
            "The log of the run", self._folder, elsewhere=self._elsewhere
        )


def _add_events(tensorboard: Any, row: Mapping[str, Any]) -> None:
    """Add a row of metrics.jsonl to TensorBoard's curves."""
    names = ("loss", "instance_loss", "class_loss", "learning_rate", "grad_norm", "kept_loss")
    curves = {name: row[name] for name in names if row.get(name) is not None}
    for group in ("subject_losses", "meter"):
        curves |= {f"{group}/{name}": value for name, value in row.get(group, {}).items()}
    for name, value in curves.items():
        tensorboard.add_scalar(name, value, row["step"])


def plain_decimal(value: float) -> str:
    """Return a number as SageMaker's metric expressions read it: decimal, with no exponent."""
    return f"{value:.8f}"


def _of_an_earlier_run(folder: Path) -> Iterator[Path]:
    """Yield the pictures, and what belongs to them, that a run of ours has left in its folder."""
    yield from (folder / "samples").glob(_OUR_SAMPLES)
    yield from (picture.path for picture in report_data.meter_pictures(folder / "meter"))
    if (scores := folder / "meter" / report_data.METER_SCORES).is_file():
        yield scores


def _open_metrics(path: Path, first_step: int) -> TextIO:
    kept = []
    if first_step and path.is_file():
        for line in path.read_text(errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # the line that was being written when the run was killed
            if row["step"] <= first_step:
                kept.append(line + "\n")
    files.write_whole(path, "".join(kept).encode())  # a run that is killed here keeps its rows
    return path.open("a")


def _tensorboard(folder: Path, first_step: int) -> Any | None:
    """Return a TensorBoard writer; None, without its slow import, if it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    # purge_step hides the earlier events of steps that a resumed run repeats.
    return SummaryWriter(log_dir=str(folder / "tensorboard"), purge_step=first_step + 1)
