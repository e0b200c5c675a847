"""Starts lists of runs with real and stand-in trainers, and says from /proc which of them live."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dreambooth.runs.run_folder import Run, RunState
from dreambooth.tiny import DATA

STAND_IN = Path(__file__).parent / "stand_in"
TRUE_WITHIN_S = 2.0
LONG_S = 300.0  # only guards against a hang


def settings(steps: int = 20) -> dict[str, object]:
    return {"train": str(DATA / "cat"), "pretrained_model": "tiny", "max_steps": steps}


def with_stand_ins(patch: pytest.MonkeyPatch) -> None:
    """Let the trainers that are started from here on be stand-ins without torch."""
    patch.setenv("PYTHONPATH", str(STAND_IN))


def wait_until(condition: Callable[[], object], seconds: float = LONG_S) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def trainers(place: Path) -> list[int]:
    """Return the ids of the living processes that train a run in this folder."""
    return [pid for pid, words in _processes() if "train" in words and str(place) in words]


def runners(place: Path) -> list[int]:
    return [
        pid
        for pid, words in _processes()
        if "dreambooth.runs.runner" in words and str(place) in words
    ]


def _processes() -> list[tuple[int, str]]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:  # it has just ended
                continue
            found.append((int(entry.name), words))  # a dead one that is not reaped has no words
    return found


def kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


# What must have happened to a run before a process is killed or stopped.
PHASES: dict[str, Callable[[Run], object]] = {
    "added": lambda run: True,
    "taken": lambda run: run.is_running,
    "begun": lambda run: run.process() is not None,
    "planned": lambda run: run.planned_steps() is not None,
    "trained": lambda run: run.last_metrics(),
    "exported": lambda run: list((run.folder / "model").glob("*")),
    "whole": lambda run: run.has_model(),
    "ended": lambda run: run.exit_code() is not None,
}


def is_true(run: Run) -> bool:
    """Return whether the state of a run is what its processes and its files say."""
    before, state, after = trainers(run.folder), run.state(), trainers(run.folder)
    if bool(before) != bool(after):
        return is_true(run)
    if state == RunState.RUNNING:
        return bool(after)
    told = {RunState.DONE: 0, RunState.STOPPED: 143}.get(state)
    if told is not None:
        return run.exit_code() == told and not after
    if state == RunState.DIED:
        return not after and run.exit_code() is None and (run.folder / "process.json").exists()
    return state == RunState.WAITING and not after and not (run.folder / "process.json").exists()
