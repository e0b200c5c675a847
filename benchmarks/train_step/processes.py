"""Run a training script in a process of its own and note when it prints each line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import dreambooth
from benchmarks.train_step.conditions import Conditions
from benchmarks.train_step.phases import Phase

ROOT = Path(dreambooth.__file__).parents[1]
_NONE = Conditions()


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line of output, ended by a newline or a carriage return.

    seconds: since the process started. text: without the end of the line.
    """

    seconds: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Peaks in bytes over all phases.

    resident: the physical memory of the process. allocated, reserved, process: as in `Phase`.
    """

    resident: int
    allocated: int | None
    reserved: int | None
    process: int | None = None
    phases: Mapping[str, Phase] = field(default_factory=dict)

    @classmethod
    def read(cls, document: dict[str, Any]) -> Memory:
        """Read what a measured process has written."""
        phases = {name: Phase(**each) for name, each in document["phases"].items()}
        return cls(**{**document, "phases": phases})


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A process that has ended. started_at: seconds since 1970; memory: None if it was killed."""

    exit_code: int
    started_at: float
    seconds: float
    lines: tuple[Line, ...]
    memory: Memory | None

    def fault(self) -> str | None:
        """Return the exit code and the last line of a process that failed, None for others."""
        if self.exit_code == 0:
            return None
        said = [line.text for line in self.lines if line.text.strip()]
        return f"exit {self.exit_code}: {said[-1] if said else 'nothing was said'}"


def run(
    script: Path,
    arguments: Sequence[object],
    *,
    folder: Path,
    conditions: Conditions = _NONE,
) -> Ended:
    """Run `script` to its end in `folder`, which is created, with the caller's environment.

    Its input and output are no terminal.
    """
    folder.mkdir(parents=True, exist_ok=True)
    memory_file = folder / "memory.json"
    child = ("-m", "benchmarks.train_step.child", memory_file)
    words = (*child, json.dumps(asdict(conditions)), script.resolve(), *arguments)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    started_at, began = time.time(), time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        assert process.stdout is not None
        with process.stdout as stream:
            lines = tuple(_lines(stream.fileno(), began))
        exit_code = process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise
    seconds = time.monotonic() - began
    memory = Memory.read(json.loads(memory_file.read_text())) if memory_file.exists() else None
    return Ended(
        exit_code=exit_code, started_at=started_at, seconds=seconds, lines=lines, memory=memory
    )


def _lines(descriptor: int, began: float) -> Iterator[Line]:
    """Yield each line with the moment of its last text: progress bars end their lines late."""
    pending, at = b"", 0.0
    while chunk := os.read(descriptor, 1 << 16):
        now = time.monotonic() - began
        first, *others = re.split(rb"[\r\n]", chunk)
        if first:
            pending, at = pending + first, now
        for piece in others:
            if pending:
                yield Line(seconds=at, text=pending.decode(errors="replace"))
            pending, at = piece, now
    if pending:
        yield Line(seconds=at, text=pending.decode(errors="replace"))
