"""In the watched process: what each phase of a job takes, seconds and memory at the peak.

A phase is what `Recorder.phase` names, and a phase within another counts for itself alone. torch's
peaks are set back at each: what the job itself says of its peak is not to be used here.
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
    """Seconds in all its `times`; peaks in bytes, None where there is no GPU to read them from.

    allocated, reserved: torch's own. process: all that the driver counts for this process, CUDA's
    context and the libraries with it, seen once a second.
    """

    seconds: float = 0.0
    times: int = 0
    allocated: int | None = None
    reserved: int | None = None
    process: int | None = None


class Watch:
    """Reads the peaks whenever a phase begins or ends, and sets them back."""

    def __init__(
        self,
        *,
        peaks: Callable[[], tuple[int, int] | None],
        process_memory: Callable[[], int | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """peaks: (allocated, reserved) since it was last called, None while there is no GPU."""
        self._peaks, self._process_memory, self._clock = peaks, process_memory, clock
        self._phases = {_OUTSIDE: Phase(times=1)}
        self._running = [_OUTSIDE]
        self._since = clock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What the `with` block takes is this phase's."""
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
        """In the block a thread reads the process's memory once a second."""
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
        """What `processes.Memory` holds, for JSON."""
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
    """By torch, once the script has brought CUDA up, and by the driver's own tool."""
    return Watch(
        peaks=TorchPeaks(), process_memory=lambda: devices.process_memory_bytes(os.getpid())
    )


def listen(watch: Watch) -> None:
    """From here on the phases of a job in this process are this watch's as well."""
    phase_of = Timings.phase

    @contextmanager
    def phase(timings: Timings, name: str) -> Iterator[None]:
        with watch.phase(name), phase_of(timings, name):
            yield

    Timings.phase = phase  # type: ignore[method-assign, assignment]


class TorchPeaks:
    """(allocated, reserved) since it was last called; None before the script has CUDA up.

    The job sets torch's peaks back too: what they were is kept for us.
    """

    def __init__(self) -> None:
        self._kept = (0, 0)
        self._set_back: Callable[..., None] | None = None

    def __call__(self) -> tuple[int, int] | None:
        """Read them and set them back."""
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
