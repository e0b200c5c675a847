"""Write every fact to a file as soon as it is found, and read what was written before a cut.

The file has one JSON object per line. It is flushed and synchronised after each line, and a line
that a killed process left half-written costs only itself.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE_NAME = "facts.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One fact: the stage that found it, its kind, its name and its figures.

    at: seconds since 1970. Kinds and their figures are those that the stages' functions add.
    """

    stage: str
    kind: str
    name: str
    figures: Mapping[str, Any] = field(default_factory=dict)
    at: float = 0.0


class FactFile:
    """Appends the facts of one stage to the file in a folder, and prints them."""

    def __init__(self, folder: Path, stage: str) -> None:
        """Take the folder, which must exist, and the stage's name."""
        self._path = folder / FILE_NAME
        self._stage = stage

    def add(self, kind: str, name: str, **figures: Any) -> None:
        """Write one fact; it is on the disk when this returns."""
        row = {"stage": self._stage, "kind": kind, "name": name, "at": round(time.time(), 1)}
        line = json.dumps({**row, "figures": figures}, default=str)
        with self._path.open("ab+") as file:
            file.write(("\n" * _ends_within_a_line(file) + line + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
        print(line, flush=True)


def _ends_within_a_line(file: Any) -> bool:
    end = file.seek(0, os.SEEK_END)
    if end == 0:
        return False
    file.seek(end - 1)
    return bool(file.read(1) != b"\n")


def read(folder: Path) -> tuple[Fact, ...]:
    """Return the facts in the folder's file, in order; none if there is no file."""
    path = folder / FILE_NAME
    return tuple(_rows(path.read_bytes().splitlines())) if path.exists() else ()


def _rows(lines: Sequence[bytes]) -> Iterator[Fact]:
    for line in lines:
        try:
            yield Fact(**json.loads(line))
        except (ValueError, TypeError):
            continue  # a line that was being written when its process was killed
