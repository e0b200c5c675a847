"""Three ways to serve a trace of arrivals: serially, by whole requests, step by step.

What takes requests from a queue, whole batch after whole batch, is the same code for real and for
simulated time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from benchmarks.serving_load.traffic import Arrival
from dreambooth.diffusion.sampling_request import SamplingRequest

if TYPE_CHECKING:  # torch comes with it, and a simulation needs none
    from dreambooth.serving.engine.drawing_jobs import DrawingJob
    from dreambooth.serving.engine.engine import Engine

SERIAL, REQUEST_LEVEL, STEP_LEVEL = "serial", "request-level", "step-level"

# Which of the waiting requests (oldest first) are drawn next, by their places: the first at least.
Choose = Callable[[Sequence[SamplingRequest]], list[int]]
# Draws requests together; yields as each is done, in their order.
Draw = Callable[[Sequence[SamplingRequest]], Iterable[Any]]


class Clock(Protocol):
    """Seconds since the start of a run."""

    def now(self) -> float: ...  # noqa: D102
    def wait_until(self, moment: float) -> None: ...  # noqa: D102


class WallClock:
    """Real time."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    def now(self) -> float:
        """Seconds since this clock was made."""
        return time.perf_counter() - self._began

    def wait_until(self, moment: float) -> None:
        """Sleep, unless the moment is over."""
        time.sleep(max(0.0, moment - self.now()))


class VirtualClock:
    """Time that passes when somebody says so."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> float:
        """Seconds since this clock was made."""
        return self.seconds

    def wait_until(self, moment: float) -> None:
        """Jump ahead, unless the moment is over."""
        self.seconds = max(self.seconds, moment)


def oldest(waiting: Sequence[SamplingRequest]) -> list[int]:
    """One at a time, in order."""
    return [0]


def alike(most_rows: int) -> Choose:
    """The oldest request and all that wait with equal steps, guidance and size, as peers do.

    As many as have `most_rows` U-Net rows. Nobody is waited for: a free device takes what is there.
    """

    def key(request: SamplingRequest) -> tuple[object, ...]:
        return (
            *(request.num_inference_steps, request.guidance_scale, request.eta),
            *(request.width, request.height),
        )

    def choose(waiting: Sequence[SamplingRequest]) -> list[int]:
        first = waiting[0]
        most = max(1, most_rows // (2 if first.guided else 1))
        same = [place for place, other in enumerate(waiting) if key(other) == key(first)]
        return same[:most]

    return choose


def batch_by_batch(
    arrivals: Sequence[Arrival], choose: Choose, draw: Draw, clock: Clock
) -> list[float]:
    """Draw whole batches, one after another; return when each arrival's picture was done."""
    finished = [0.0] * len(arrivals)
    waiting: list[int] = []
    come = 0
    while waiting or come < len(arrivals):
        if not waiting:
            clock.wait_until(arrivals[come].seconds)
        while come < len(arrivals) and arrivals[come].seconds <= clock.now():
            waiting.append(come)
            come += 1
        if not waiting:  # a sleep may end a little early
            continue
        places = choose([arrivals[number].request for number in waiting])
        batch = [waiting[place] for place in places]
        waiting = [number for number in waiting if number not in batch]
        drawn = draw([arrivals[number].request for number in batch])
        for number, _ in zip(batch, drawn, strict=True):
            finished[number] = clock.now()
    return finished


def step_by_step(engine: Engine, arrivals: Sequence[Arrival]) -> list[float]:
    """Hand every request to the engine as it comes; return when each picture was done."""
    finished = [0.0] * len(arrivals)
    clock = WallClock()

    def note(number: int) -> Callable[[DrawingJob], None]:
        def done(_: DrawingJob) -> None:
            finished[number] = clock.now()

        return done

    jobs = []
    for number, arrival in enumerate(arrivals):
        clock.wait_until(arrival.seconds)
        jobs.append(engine.submit([arrival.request]))
        jobs[-1].add_done_callback(note(number))
    for job in jobs:
        job.result()
    return finished
