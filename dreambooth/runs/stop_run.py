"""Stop a run: SIGTERM, then what a container does, SIGKILL. It always ends.

Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from typing import Final

from dreambooth.errors import ResourceError, UserError
from dreambooth.process import files
from dreambooth.process.identity import ProcessIdentity
from dreambooth.runs import run_folder
from dreambooth.runs.run_folder import Run, RunState

GRACE_S: Final = 120.0
"""Between SIGTERM and SIGKILL, as on SageMaker."""

_UNKNOWN_S: Final = 30.0  # a trainer says who it is within its first seconds
_KILLED_S: Final = 30.0
_POLL_S: Final = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class StopResult:
    """What a stop has left. was_killed: whether the trainer did not end in time."""

    state: RunState
    has_model: bool
    checkpoint_step: int | None
    was_killed: bool = False

    @property
    def sentence(self) -> str:
        """Return what has happened and what is left, in words."""
        left = []
        if self.checkpoint_step is not None:
            left.append(f"a checkpoint of step {self.checkpoint_step}, from which it can go on")
        if self.has_model:
            left.append("a model")
        how = " It did not end in time and was killed." if self.was_killed else ""
        what = " and ".join(left) or "neither a checkpoint nor a model"
        return f"The run is {self.state}.{how} It has {what}."


def stop(run: Run, *, grace_s: float = GRACE_S) -> StopResult:
    """Stop a run, or take a waiting one off the list, and return once it has ended.

    A run that has ended is left as it is. Raises UserError where the trainer runs elsewhere or
    belongs to another user.
    """
    state = run.state()
    if state == RunState.WAITING:
        _take_off(run)
        state = run.state()  # a trainer may have been faster
    was_killed = state == RunState.RUNNING and _end(run, grace_s)
    return StopResult(
        state=run.state(),
        has_model=run.has_model(),
        checkpoint_step=run.checkpoint_step(),
        was_killed=was_killed,
    )


def _take_off(run: Run) -> None:
    try:
        with run.changing() as state:
            if state == RunState.WAITING:
                _write_exit_code(run, 128 + signal.SIGTERM)
    except UserError:
        if not run.is_running:
            raise


def _end(run: Run, grace_s: float) -> bool:
    """End the trainer and return whether it had to be killed."""
    began = time.monotonic()
    told: ProcessIdentity | None = None
    kill_at = float("inf")
    was_killed = False
    while run.is_running:
        now = time.monotonic()
        process = run.process()
        if told is None and process is not None and process.is_running:
            told, kill_at = process, now + grace_s
            if _is_first_to_tell(run):
                _send(run, process, signal.SIGTERM)
        elif told is None:
            if now > began + _UNKNOWN_S:
                raise UserError(_elsewhere(run, process))
        elif process != told:  # it has ended, and the run goes on already with another one
            break
        elif now > kill_at:
            if was_killed:
                raise ResourceError(
                    f"The process {told.pid} of the run {run.name} does not end, though it was "
                    "killed: it waits for a disk or a GPU, and ends with that."
                )
            was_killed, kill_at = True, now + _KILLED_S
            _send(run, told, signal.SIGKILL)
        time.sleep(_POLL_S)
    if told is None:  # it ended before it had said who it is, and so the run would still wait
        _take_off(run)
    else:
        _record_end(run, run_folder.KILLED if was_killed else 128 + signal.SIGTERM)
    return was_killed


def _is_first_to_tell(run: Run) -> bool:
    """Return whether nobody else stops this trainer: a second SIGTERM would cost its checkpoint."""
    try:
        os.close(os.open(run.folder / run_folder.STOPPING, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    except OSError:  # a full disk is no reason not to stop
        pass
    return True


def _send(run: Run, process: ProcessIdentity, number: signal.Signals) -> None:
    try:
        process.send(number)
    except PermissionError as error:
        raise UserError(
            f"The process {process.pid} of the run {run.name} belongs to another user: let that "
            "user stop it."
        ) from error


def _elsewhere(run: Run, process: ProcessIdentity | None) -> str:
    where = "it has not said" if process is None else f"{process.host}, process {process.pid}"
    return (
        f"The run {run.name} is running, but not as a process that can be seen from here: stop it "
        f"on its own machine or in its container ({where})."
    )


def _record_end(run: Run, code: int) -> None:
    """Store the exit code of a trainer that we have ended and that left none itself."""
    # It may train again, or the disk may be full.
    with contextlib.suppress(UserError, OSError), run.changing() as state:
        if state == RunState.DIED and run.is_told_to_stop():
            _write_exit_code(run, code)


def _write_exit_code(run: Run, code: int) -> None:
    files.write_whole(run.folder / run_folder.EXIT_CODE, f"{code}\n".encode())
