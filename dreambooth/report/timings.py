"""What a job takes, measured: seconds of each phase, peak memory. Standard library only."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class Timings:
    """Seconds per named phase, in the order of their first start.

    A phase within a phase stops the outer one's clock, so that all of them add up; one that comes
    again adds to itself.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of the `with` block to this phase."""
        self._switch()
        self._running.append(name)
        self._seconds.setdefault(name, 0.0)
        try:
            yield
        finally:
            self._switch()
            self._running.pop()

    def phases(self) -> tuple[tuple[str, float], ...]:
        """(name, seconds) of each phase so far."""
        self._switch()
        return tuple(self._seconds.items())

    def _switch(self) -> None:
        """Count the time since the last switch to the innermost phase."""
        now = self._clock()
        if self._running:
            self._seconds[self._running[-1]] += now - self._since
        self._since = now


def peak_memory_bytes() -> int:
    """The most physical memory that this process has held; 0 where the system does not tell.

    Linux: VmHWM. getrusage's ru_maxrss would begin with that of the process that started us.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
