"""Execute the waiting runs of a list, one after another, as a small process of its own.

`RunList.start` starts it. It holds a lock of the list as long as it lives and ends when no run
waits. All that it knows lies on the disk, so that another one goes on where it was killed; a
trainer outlives it. Standard library only.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from dreambooth.errors import DreamBoothError
from dreambooth.process import child_process, files, logs
from dreambooth.runs import record, run_folder
from dreambooth.runs.run_folder import Run, RunState
from dreambooth.runs.run_list import RUNNER_LOCK, RunList

_POLL_S: Final = 0.2
_LOCK_S: Final = 1.0
_OPEN_LOG: Final = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK  # a pipe would wait

log = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> int:
    """Execute the waiting runs of the list in the folder argv[0]."""
    logs.to_stderr("info")
    runs = RunList(Path(argv[0]))
    tried: set[str] = set()
    while True:
        lock = os.open(runs.folder / RUNNER_LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not files.try_lock(lock, patience_s=_LOCK_S):
                return 0  # another runner does it
            log.info("the runner of %s begins, process %d", runs.folder, os.getpid())
            runs.sweep()
            _execute_all(runs, tried)
            log.info("no run waits: the runner ends")
        finally:
            os.close(lock)
        # Whoever added a run while the lock was held has started no runner.
        if _next(runs, tried) is None:
            return 0


def _execute_all(runs: RunList, tried: set[str]) -> None:
    while (run := _next(runs, tried)) is not None:
        if any(_state(other) == RunState.RUNNING for other in runs.runs()):
            time.sleep(_POLL_S)  # also one that was started by hand, or by a runner that was killed
            continue
        before = _settings_file(run)
        try:
            was_started = _execute(run)
        except (OSError, DreamBoothError) as error:  # the disk is full, or it was deleted
            log.warning("%s cannot be started: %s", run.name, error)
            tried.add(run.name)
            continue
        # What waits with new settings was sent here again, by the time its trainer had ended.
        if was_started and _settings_file(run) == before and _state(run) == RunState.WAITING:
            tried.add(run.name)
            _let_it_have_died(run)


def _settings_file(run: Run) -> tuple[int, int] | None:
    """Return what changes whenever a trainer, or somebody else, writes the settings."""
    with contextlib.suppress(OSError):
        status = (run.folder / run_folder.SETTINGS).stat()
        return status.st_ino, status.st_mtime_ns
    return None


def _next(runs: RunList, tried: set[str]) -> Run | None:
    waiting = (run for run in runs.runs() if _state(run) == RunState.WAITING)
    return next((run for run in waiting if run.name not in tried), None)


def _state(run: Run) -> RunState | None:
    try:
        return run.state()
    except DreamBoothError:  # it was just deleted, or is another user's
        return None


def _execute(run: Run) -> bool:
    """Train a run to its end, in a process that inherits the lock which is taken here.

    Return whether a trainer was started. Raises OSError and ResourceError.
    """
    lock = run.take()
    if lock is None:
        return False
    try:
        if run.state_without_a_trainer() != RunState.WAITING:  # it was stopped or begun meanwhile
            return False
        output = os.open(run.folder / run_folder.LOG, _OPEN_LOG, 0o644)
        try:
            trainer = subprocess.Popen(
                [sys.executable, "-P", "-m", "dreambooth", "train", "--run_dir", str(run.folder)],
                env={
                    **child_process.environment(os.environ),
                    record.LOCK_VARIABLE: str(lock),
                },
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                pass_fds=[lock],
            )
        finally:
            os.close(output)
    finally:
        os.close(lock)
    log.info("%s begins, process %d", run.name, trainer.pid)
    code = trainer.wait()
    log.info("%s ended with code %d: %s", run.name, code, _state(run))
    return True


def _let_it_have_died(run: Run) -> None:
    """Let a run whose trainer ended before it began, as its log says, not wait for ever."""
    with contextlib.suppress(DreamBoothError, OSError), run.changing() as state:
        if state == RunState.WAITING:
            record.mark_begun(run, os.getpid())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
