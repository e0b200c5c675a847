"""Measure the seconds and the peak memory of each phase of a job, inside the job's process.

The phases are those of `Timings.phase`; the time of a phase inside another counts only for the
inner one. torch's peaks are reset at each phase, so the peak that the job itself reports must not
be used here.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from dreambooth.report.timings import Timings, peak_memory_bytes
from dreambooth.training import device as devices

_POLL_S = 1.0
_OUTSIDE = ""


@dataclass(slots=True, kw_only=True)
class Phase:
    """The figures of one phase, which ran `times` times in `seconds` altogether.

    allocated, reserved, process: peaks in bytes, None without a GPU. allocated, reserved: torch's
    own. process: what the driver counts for this process, with CUDA's context and the libraries,
    read once a second.
    """

    seconds: float = 0.0
    times: int = 0
    allocated: int | None = None
    reserved: int | None = None
    process: int | None = None


class Watch:
    """Reads and resets the peaks whenever a phase begins or ends."""

    def __init__(
        self,
        *,
        peaks: Callable[[], tuple[int, int] | None],
        process_memory: Callable[[], int | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """peaks: returns (allocated, reserved) since its last call, None without a GPU."""
        self._peaks, self._process_memory, self._clock = peaks, process_memory, clock
        self._phases = {_OUTSIDE: Phase(times=1)}
        self._running = [_OUTSIDE]
        self._since = clock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what the `with` block takes for this phase."""
        self._switch()
        self._running.append(name)
        self._phases.setdefault(name, Phase()).times += 1
        try:
            yield
        finally:
            self._switch()
            self._running.pop()

    @contextmanager
    def polling(self) -> Iterator[None]:
        """Read the process's memory once a second, in a thread, during the `with` block."""
        ended = threading.Event()

        def poll() -> None:
            while not ended.wait(_POLL_S):
                self._read_process_memory()

        thread = threading.Thread(target=poll, name="memory", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def found(self) -> dict[str, Any]:
        """Return the fields of `processes.Memory`, for JSON."""
        self._switch()
        self._read_process_memory()

        def highest(name: str) -> int | None:
            each = (getattr(phase, name) for phase in self._phases.values())
            return max((peak for peak in each if peak is not None), default=None)

        return {
            "resident": peak_memory_bytes(),
            **{name: highest(name) for name in ("allocated", "reserved", "process")},
            "phases": {
                name: asdict(phase) for name, phase in self._phases.items() if name != _OUTSIDE
            },
        }

    def _switch(self) -> None:
        now, phase = self._clock(), self._phases[self._running[-1]]
        phase.seconds += now - self._since
        self._since = now
        peaks = self._peaks()
        if peaks is not None:
            phase.allocated = max(phase.allocated or 0, peaks[0])
            phase.reserved = max(phase.reserved or 0, peaks[1])

    def _read_process_memory(self) -> None:
        phase, held = self._phases[self._running[-1]], self._process_memory()
        if held is not None:
            phase.process = max(phase.process or 0, held)


def of_this_process() -> Watch:
    """Return a watch that reads torch's peaks, once CUDA is initialised, and the driver's tool."""
    return Watch(
        peaks=TorchPeaks(), process_memory=lambda: devices.process_memory_bytes(os.getpid())
    )


def listen(watch: Watch) -> None:
    """From now on, also report the phases of a job in this process to the watch."""
    phase_of = Timings.phase

    @contextmanager
    def phase(timings: Timings, name: str) -> Iterator[None]:
        with watch.phase(name), phase_of(timings, name):
            yield

    Timings.phase = phase  # type: ignore[method-assign, assignment]


class TorchPeaks:
    """Returns torch's (allocated, reserved) since the last call; None until CUDA is initialised.

    The job resets torch's peaks too, so they are saved before each of its resets.
    """

    def __init__(self) -> None:
        self._kept = (0, 0)
        self._set_back: Callable[..., None] | None = None

    def __call__(self) -> tuple[int, int] | None:
        """Read the peaks and reset them."""
        cuda = getattr(sys.modules.get("torch"), "cuda", None)
        if cuda is None or not cuda.is_initialized():
            return None
        if self._set_back is None:
            set_back = self._set_back = cuda.reset_peak_memory_stats

            def keep_and_set_back(*device: Any) -> None:
                self._keep(cuda)
                set_back(*device)

            cuda.reset_peak_memory_stats = keep_and_set_back
        self._keep(cuda)
        found, self._kept = self._kept, (0, 0)
        self._set_back()
        return found

    def _keep(self, cuda: Any) -> None:
        allocated, reserved = self._kept
        self._kept = (
            max(allocated, cuda.max_memory_allocated()),
            max(reserved, cuda.max_memory_reserved()),
        )
