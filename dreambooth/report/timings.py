"""Measures a job: the seconds of each phase, and the peak memory (standard library only)."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class Timings:
    """Seconds per named phase, in the order of their first start.

    A phase within a phase stops the outer one's clock, so that no time is counted twice. A repeated
    phase adds to its earlier time.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the `with` block to this phase."""
        self._switch()
        self._running.append(name)
        self._seconds.setdefault(name, 0.0)
        try:
            yield
        finally:
            self._switch()
            self._running.pop()

    def phases(self) -> tuple[tuple[str, float], ...]:
        """Return (name, seconds) of each phase so far."""
        self._switch()
        return tuple(self._seconds.items())

    def _switch(self) -> None:
        """Add the time since the last switch to the innermost phase."""
        now = self._clock()
        if self._running:
            self._seconds[self._running[-1]] += now - self._since
        self._since = now


def peak_memory_bytes() -> int:
    """Return the most physical memory that this process has held; 0 where that is unknown.

    It is Linux's VmHWM, because getrusage's ru_maxrss starts at the parent process's value.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
