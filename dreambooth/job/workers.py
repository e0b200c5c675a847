"""Start the processes that train on this host, pass stop signals on, and end with one sentence.

The process that the user or the platform started is their parent: it reads the settings, prints the
training plan and holds the locks, and loads no torch. Each of the others is told its place by the
variables that torchrun sets, and by WORKER what the parent has done already. torchrun itself is not
used: of a group that neither grows nor restarts it would only start the processes. Once one of them
has ended with a code other than 0 it sends SIGTERM to the others, of which the main one may still
write a checkpoint, and SIGKILL after 30 s that cannot be set (torch 2.13, elastic/multiprocessing/
api.py, `SubprocessContext._poll`); which hosts are missing, and why one failed, it does not say.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from dreambooth.errors import (
    DreamBoothError,
    HyperparameterError,
    ResourceError,
    in_one_line,
)
from dreambooth.job.launcher import NotJoinedError
from dreambooth.job.meeting import Meeting, Waiting
from dreambooth.process import child_process, failure, logs
from dreambooth.process.stop import Stopped, StopSignals, signal_of

WORKER: Final = "DREAMBOOTH_WORKER"

STOP_S: Final = 110.0
"""What the processes have after a stop signal, of SageMaker's 120 s."""

LAST_S: Final = 30.0
"""What the others have once one process has ended; they leave together, after the last file."""

_UNMET_S = 2.0  # the same before they have met: until then they have no files
_POLL_S = 0.05
_INTERFACES = Path("/sys/class/net")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class FromParent:
    """What the parent tells a process that trains.

    parent: its process number. model_folder: the unpacked model. workspace: a folder of this host
    alone. end_file: where the process writes what it failed of. shown_plan: the text of the
    training plan that was printed.
    """

    parent: int
    model_folder: Path
    workspace: Path
    end_file: Path
    is_main: bool
    shown_plan: str

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> FromParent | None:
        """Return what the parent says, None in a process that has none."""
        text = environ.get(WORKER)
        if not text:
            return None
        told = json.loads(text)
        for name in ("model_folder", "workspace", "end_file"):
            told[name] = Path(told[name])
        return cls(**told)

    def as_text(self) -> str:
        """Return the text that `read` reads."""
        told = {field.name: getattr(self, field.name) for field in fields(self)}
        return json.dumps(told, default=str)

    @property
    def met_file(self) -> Path:
        """Return the file that says that this process has reached all others of the job."""
        return self.end_file.with_suffix(".met")

    def tell(self, error: Exception) -> None:
        """Leave what this process failed of for the parent, which says it once for all of them."""
        known = failure.for_the_user(error)
        told: dict[str, object] = {
            "sentence": str(known) if known is not None else "",
            "faults": list(known.faults) if isinstance(known, HyperparameterError) else [],
            "may_follow": isinstance(error, NotJoinedError),
            "name": f"{type(error).__name__}: {in_one_line(error)}",
            "trace": "" if known is not None else logs.trace_of(error),
        }
        part = self.end_file.with_suffix(".part")
        part.write_text(json.dumps(told))
        part.rename(self.end_file)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """All processes of a job, and which of them this host starts."""

    on_each_host: int
    hosts: int = 1
    host: int = 0
    address: str = "127.0.0.1"
    port: int
    interface: str | None = None

    def variables(self, local: int, environ: Mapping[str, str]) -> dict[str, str]:
        """Return the variables of a process of this host, by its number here."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        ours = {
            "RANK": str(self.host * self.on_each_host + local),
            "LOCAL_RANK": str(local),
            "WORLD_SIZE": str(self.hosts * self.on_each_host),
            "LOCAL_WORLD_SIZE": str(self.on_each_host),
            "GROUP_RANK": str(self.host),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }
        preset = {"OMP_NUM_THREADS": str(max(1, cores // self.on_each_host))}
        # A platform may name an interface that its containers do not have.
        if self.interface is not None and (_INTERFACES / self.interface).exists():
            preset |= {"NCCL_SOCKET_IFNAME": self.interface, "GLOO_SOCKET_IFNAME": self.interface}
        return {**preset, **environ, **ours}


def run(
    argv: Sequence[str],
    environ: Mapping[str, str],
    group: Group,
    *,
    model_folder: Path,
    workspace: Path,
    shown_plan: str,
    meeting: Meeting,
    stop: StopSignals,
) -> None:
    """Train with the processes of this host, started with the arguments of their parent.

    Returns when all have ended well. Raises the error of the process that failed first, Stopped
    where they were stopped, and UserError where they cannot reach each other.
    """
    first = group.host * group.on_each_host
    workers = [
        FromParent(
            parent=os.getpid(),
            model_folder=model_folder,
            workspace=workspace,
            end_file=workspace / f"end-{local}.json",
            is_main=first + local == 0,
            shown_plan=shown_plan,
        )
        for local in range(group.on_each_host)
    ]
    running: list[subprocess.Popen[bytes]] = []
    try:
        with stop.held():  # a signal is passed on, and answered when all have ended
            for local, worker in enumerate(workers):
                variables = {**group.variables(local, environ), WORKER: worker.as_text()}
                running.append(_start(argv, variables))
            early = _watch(running, workers, meeting, stop)
            _raise_failure(running, early, workers, meeting, stop)
    finally:
        for process in running:
            process.kill()
            process.wait()


def _start(argv: Sequence[str], environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own: a terminal's signals reach its parent alone."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "dreambooth", "train", *argv],
        env=child_process.environment(environ),
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )


def _watch(
    processes: Sequence[subprocess.Popen[bytes]],
    workers: Sequence[FromParent],
    meeting: Meeting,
    stop: StopSignals,
) -> tuple[int, ...]:
    """Return when all processes have ended, with the places of those that ended first.

    These are all of them where none was seen running without another, and none where another host
    ended before them. Those that stay behind the others are killed.
    """
    waiting = Waiting("processes must reach each other at any port, as hosts do at {port}")
    is_told, have_met, deadline = False, False, float("inf")
    early: tuple[int, ...] | None = None
    while running := [process for process in processes if process.poll() is None]:
        now = time.monotonic()
        meeting.poll()
        if stop.number is not None and not is_told:
            is_told, deadline = True, min(deadline, now + STOP_S)
            for process in running:
                process.terminate()  # whatever the signal: one that is still starting ends silently
        have_met = have_met or all(worker.met_file.exists() for worker in workers)
        if early is None and (len(running) < len(processes) or meeting.ends):
            early = tuple(n for n, one in enumerate(processes) if one.returncode is not None)
            deadline = min(deadline, now + (LAST_S if have_met else _UNMET_S))
        if not (have_met or is_told or early is not None):
            waiting.note("processes", meeting.others)
        if now > deadline:
            deadline = float("inf")
            if is_told and have_met:
                log.warning("%d of the processes did not stop in time and are killed", len(running))
            for process in running:
                process.kill()
        time.sleep(_POLL_S)
    return tuple(range(len(processes))) if early is None else early


def _raise_failure(
    processes: Sequence[subprocess.Popen[bytes]],
    early: Sequence[int],
    workers: Sequence[FromParent],
    meeting: Meeting,
    stop: StopSignals,
) -> None:
    """Raise what ended the job, if anything did but the signal that is answered already.

    When one process fails, the others lose their connections to it and fail too, so a sentence for
    the user counts most, then a stop signal, then a process that was killed, and last a sentence
    that may follow from these.
    """
    codes = [process.returncode for process in processes]
    if not any(codes):
        return
    told = [found for found in map(_told, workers) if found is not None]
    for one in told:
        if one["faults"]:
            raise HyperparameterError(one["faults"])
        if one["sentence"] and not one["may_follow"]:
            raise DreamBoothError(one["sentence"])
    if stop.number is not None:
        return
    for stopped in filter(None, map(signal_of, codes)):
        raise Stopped(stopped)
    killed = [-codes[place] for place in early if codes[place] < 0]
    if signal.SIGKILL not in killed:  # NCCL aborts processes that have lost another host
        meeting.wait_for_an_end(LAST_S)
        meeting.refuse_ended_hosts()
    for number in killed:
        raise ResourceError(
            f"A process of this job was ended by {signal.Signals(number).name}, and the "
            f"other{'s' * (len(codes) > 2)} with it: if memory ran out on this host, set "
            "processes=1 or take a larger one."
        )
    for one in sorted(told, key=lambda one: not one["sentence"]):
        if one["sentence"]:
            raise DreamBoothError(one["sentence"])
        print(one["trace"], file=sys.stderr)
        raise DreamBoothError(f"InternalError: {one['name']}")
    raise DreamBoothError("A process of this job ended without a word.")


def _told(worker: FromParent) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(worker.end_file.read_text())
    except (OSError, ValueError):
        return None
    return found
