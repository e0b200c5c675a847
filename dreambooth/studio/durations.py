"""Say how long a job will train, from steps of such a job that this machine has taken.

They are those of another run of the list, or of a measurement: the job itself, ended after a few
steps. Settings that change no step's time may differ.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import shutil
import socket
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Final

from dreambooth.errors import DreamBoothError, UserError
from dreambooth.process import child_process, files
from dreambooth.report import report_data
from dreambooth.runs import run_folder, run_list
from dreambooth.runs.run_folder import Run, RunState
from dreambooth.runs.run_list import RunList
from dreambooth.settings import hyperparameters
from dreambooth.settings.hyperparameters import Hyperparameters

FOLDER: Final = ".measurements"  # no run has such a name
STEPS: Final = 6
"""Steps of a measurement; the first one is not counted."""

SPEEDLESS: Final = frozenset(
    {
        *("epochs", "max_steps", "seed", "resume", "lr_warmup_steps", "lr_scheduler"),
        *("learning_rate", "adam_weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
        *("max_grad_norm", "prior_loss_weight", "center_crop", "num_class_images"),
        *("class_data_dir", "prior_generation_precision", "checkpointing_steps"),
        *("checkpointing_minutes", "checkpoints_total_limit", "keep_last_checkpoint"),
        *("sample_steps", "sample_prompt", "export_precision", "export_single_file"),
        *("compute_fid", "compute_scores", "fid_features", "meter", "early_stopping"),
        *("keep_states", "meter_pictures_share"),
    }
)
"""The hyperparameters that change no step's time."""

_KEPT: Final = (run_folder.SETTINGS, run_folder.METRICS, run_folder.PROCESS)
_LEAST_ROWS: Final = 4
_ROWS: Final = 200  # of a run, the last ones
_MEASURE_S: Final = 900.0
_POLL_S: Final = 0.2
_ELSEWHERE: Final = "start the page with another --dir"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """The median time of a step. basis: a clause that says whose steps these were."""

    seconds: float
    basis: str

    def sentence(self, steps: int) -> str:
        """Return in words how long so many steps take, and what this rests on."""
        return (
            f"about {_in_words(steps * self.seconds)} for {steps} steps at {self.seconds:.2g} s, "
            f"{self.basis}. Loading, class images, sample pictures and writing come on top."
        )


def known(runs: RunList, settings: Mapping[str, object]) -> StepTime | None:
    """Return the time of a step of the newest such job on this machine, None without one."""
    wanted = _like(settings)
    for run in sorted(_candidates(runs), key=lambda run: run.begun_at() or 0.0, reverse=True):
        if _is_of_this_machine(run) and _like(run.settings()) == wanted:
            seconds = _step_seconds(run)
            if seconds is not None:
                return StepTime(seconds=seconds, basis=_basis(run, runs))
    return None


async def measure(runs: RunList, draft: Run, settings: Mapping[str, object]) -> None:
    """Take a few steps of a draft's job, of which `known` knows afterwards.

    Raises UserError with the job's sentence where it does not get so far.
    """
    if any(status.state == RunState.RUNNING for status in await asyncio.to_thread(runs.statuses)):
        raise UserError("A run is being trained, which would disturb the measurement: let it end.")
    run = Run(runs.folder / FOLDER / draft.name)
    await asyncio.to_thread(_prepare, run, settings)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "dreambooth", "train", f"--run_dir={run.folder}"),
        env=child_process.environment(os.environ),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + _MEASURE_S
        while process.returncode is None and run.last_metrics().get("step", 0) < STEPS:
            if time.monotonic() > deadline:
                raise UserError(
                    f"{STEPS} steps took more than {_MEASURE_S / 60:.0f} minutes on this machine, "
                    "and were given up: it is too slow for this job."
                )
            await asyncio.sleep(_POLL_S)
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        fault = run.failure()
        await asyncio.to_thread(_thin_out, run)
    if _step_seconds(run) is None:
        raise UserError(fault or "The measurement ended before its steps were taken.")


def _prepare(run: Run, settings: Mapping[str, object]) -> None:
    with files.disk_faults_named("The measurement", run.folder, elsewhere=_ELSEWHERE):
        shutil.rmtree(run.folder, ignore_errors=True)
        run.folder.mkdir(parents=True)
        run.write_settings(
            {
                **{name: value for name, value in settings.items() if name not in SPEEDLESS},
                # What the steps need of the rest, and nothing besides.
                **{name: settings[name] for name in ("class_data_dir",) if name in settings},
                "num_class_images": "1",
                "max_steps": str(STEPS),
            }
        )


def _thin_out(run: Run) -> None:
    """Keep of a measurement what `known` reads."""
    for path in run.folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name not in _KEPT:
            path.unlink(missing_ok=True)


def _candidates(runs: RunList) -> Iterator[Run]:
    yield from runs.runs()
    yield from RunList(runs.folder / FOLDER).runs()


def _is_of_this_machine(run: Run) -> bool:
    process = run.process()
    return process is not None and process.host == socket.gethostname()


def _like(settings: Mapping[str, object]) -> dict[str, object] | None:
    """Return the values of the settings that decide a step's time, None for wrong settings."""
    names = {row.name for row in fields(Hyperparameters)} - SPEEDLESS
    given = {key: value for key, value in settings.items() if key not in run_list.OPTIONS}
    try:
        parsed = hyperparameters.parse(given).hyperparameters
    except DreamBoothError:
        return None
    values = {name: getattr(parsed, name) for name in names}
    return {
        name: os.path.abspath(value) if isinstance(value, str) and os.path.exists(value) else value
        for name, value in values.items()
    }


def _step_seconds(run: Run) -> float | None:
    rows = report_data.read_metrics(run.folder / run_folder.METRICS)[1:][-_ROWS:]
    seconds = [row.seconds for row in rows if row.seconds is not None]
    return statistics.median(seconds) if len(seconds) >= _LEAST_ROWS else None


def _basis(run: Run, runs: RunList) -> str:
    if run.folder.parent == runs.folder:
        return f"as those of the run {run.name} on this machine"
    begun = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.begun_at() or 0))
    return f"measured with {STEPS - 1} steps of this job on this machine at {begun}"


def _in_words(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} seconds"
    if seconds < 90 * 60:
        return f"{math.ceil(seconds / 60)} minutes"
    return f"{seconds / 3600:.1f} hours"
