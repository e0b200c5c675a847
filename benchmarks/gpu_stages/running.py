"""Run the stages one after another, each in a process that ends with its time.

A stage that hangs or crashes costs only itself. When it is over, all processes that it started are
killed, so that they neither hold the GPU's memory nor take time from the next stage.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import dreambooth
from benchmarks.gpu_stages.facts import FactFile
from benchmarks.gpu_stages.stages import Stage, seconds_for

ROOT = Path(dreambooth.__file__).parents[1]
LOG_NAME = "log.txt"

DONE, CRASHED, KILLED = "done", "crashed", "killed"
CUT_OFF, LEFT_OUT = "cut off", "left out"
"""How a stage can end; the fact about it says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageContext:
    """What every stage is given.

    out: the folder of the facts. work: a folder for what may be lost. model: the model folder,
    which the stage "model" writes where it is not there yet. peer: diffusers' train_dreambooth.py,
    or None. dry: everything in miniature, on any device.
    """

    out: Path
    work: Path
    model: Path
    peer: Path | None = None
    dry: bool = False

    def to_json(self) -> str:
        """Return the context as text for a command line."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> StageContext:
        """Read what `to_json` has written."""
        given = json.loads(text)
        return cls(
            out=Path(given["out"]),
            work=Path(given["work"]),
            model=Path(given["model"]),
            peer=None if given["peer"] is None else Path(given["peer"]),
            dry=given["dry"],
        )


Command = Callable[[Stage, StageContext], Sequence[str]]


def command_of(stage: Stage, context: StageContext) -> Sequence[str]:
    """Return the command that runs a stage in this environment."""
    return [sys.executable, "-m", "benchmarks.gpu_stages.child", stage.name, context.to_json()]


def run_all(
    stages: Sequence[Stage],
    context: StageContext,
    *,
    budget_s: float,
    packages: Path | None = None,
    command: Command = command_of,
) -> None:
    """Run the stages within the budget, and write a fact about the end of each.

    packages: a folder of Python packages for the stages. Raises KeyboardInterrupt on SIGINT and
    SIGTERM; the running stage is killed and the facts up to then are kept.
    """
    ends = time.monotonic() + budget_s
    facts = FactFile(context.out, "run")
    # SIGTERM must reach the running stage too, which has a session of its own.
    with _terminated_as_interrupted(), (context.out / LOG_NAME).open("ab") as log:
        for stage in stages:
            left = ends - time.monotonic()
            seconds = seconds_for(stage, left)
            if seconds is None:
                rest = f"{max(0, left):.0f} of the budget's {budget_s:g} s were left"
                facts.add("stage", stage.name, ended=LEFT_OUT, seconds=0, why=rest)
                continue
            log.write(f"\n===== {stage.name}\n".encode())
            log.flush()
            began = time.monotonic()
            facts.add("begins", stage.name, sentence=stage.sentence, may_take_s=round(seconds))
            process = command(stage, context)
            ended, why = _run(process, _environment(packages), log.fileno(), seconds)
            if ended == KILLED and seconds < stage.limit_s:
                ended, why = CUT_OFF, f"the budget of {budget_s:g} s was used up"
            taken = round(time.monotonic() - began, 1)
            facts.add("stage", stage.name, ended=ended, seconds=taken, why=why)


def _run(
    command: Sequence[str], environment: Mapping[str, str], log: int, seconds: float
) -> tuple[str, str | None]:
    """Run a command for so many seconds at most; return how it ended, and why."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,  # ends when this process ends, however it does: see child.py
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    try:
        code = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return KILLED, f"it was not over after {seconds:.0f} s"
    finally:
        _kill(process)
    if code == 0:
        return DONE, None
    return CRASHED, f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a stage's process with all that it started, also in sessions of their own."""
    started = [process.pid, *_descendants(process.pid)] if process.returncode is None else []
    for pid in started:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.stdin is not None:
        process.stdin.close()
    process.wait()


def _descendants(pid: int) -> list[int]:
    """Return the ids of the processes that a process and its children have started."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            after_name = path.read_text(errors="replace").rpartition(")")[2]
            parents[int(path.parent.name)] = int(after_name.split()[1])
    found = [pid]
    for parent in found:  # grows
        found += [child for child, its_parent in parents.items() if its_parent == parent]
    return found[1:]


def _environment(packages: Path | None) -> dict[str, str]:
    """Return the environment of a stage: our checkout, the packages, and no network."""
    paths = [str(ROOT), *([str(packages)] if packages else [])]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM too."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
