"""Serve a trace of arrivals in three ways: serially, by whole requests, and step by step.

The code that takes whole batches from a queue is the same for real and for simulated time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from benchmarks.serving_load.traffic import Arrival
from dreambooth.diffusion.sampling_request import SamplingRequest

if TYPE_CHECKING:  # these load torch, and a simulation needs none
    from dreambooth.serving.engine.drawing_jobs import DrawingJob
    from dreambooth.serving.engine.engine import Engine

SERIAL, REQUEST_LEVEL, STEP_LEVEL = "serial", "request-level", "step-level"

# Returns which of the waiting requests (oldest first) are drawn next, as indices, 0 among them.
Choose = Callable[[Sequence[SamplingRequest]], list[int]]
# Draws requests together and yields in their order, each time one is done.
Draw = Callable[[Sequence[SamplingRequest]], Iterable[Any]]


class Clock(Protocol):
    """A clock that counts seconds from the start of a run."""

    def now(self) -> float: ...  # noqa: D102
    def wait_until(self, moment: float) -> None: ...  # noqa: D102


class WallClock:
    """A clock of real time."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    def now(self) -> float:
        """Return the seconds since this clock was made."""
        return time.perf_counter() - self._began

    def wait_until(self, moment: float) -> None:
        """Sleep until `moment`, unless it has passed."""
        time.sleep(max(0.0, moment - self.now()))


class VirtualClock:
    """A clock that moves only when it is set forward."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> float:
        """Return the seconds since this clock was made."""
        return self.seconds

    def wait_until(self, moment: float) -> None:
        """Jump ahead to `moment`, unless it has passed."""
        self.seconds = max(self.seconds, moment)


def oldest(waiting: Sequence[SamplingRequest]) -> list[int]:
    """Choose the oldest request alone."""
    return [0]


def alike(most_rows: int) -> Choose:
    """Choose the oldest request and those that wait with equal steps, guidance, eta and size.

    Other servers do the same. At most `most_rows` U-Net rows are chosen, but at least one request.
    A free device takes what is there and does not wait for more.
    """

    def key(request: SamplingRequest) -> tuple[object, ...]:
        return (
            *(request.num_inference_steps, request.guidance_scale, request.eta),
            *(request.width, request.height),
        )

    def choose(waiting: Sequence[SamplingRequest]) -> list[int]:
        first = waiting[0]
        most = max(1, most_rows // first.unet_rows)
        same = [place for place, other in enumerate(waiting) if key(other) == key(first)]
        return same[:most]

    return choose


def batch_by_batch(
    arrivals: Sequence[Arrival], choose: Choose, draw: Draw, clock: Clock
) -> list[float]:
    """Draw whole batches one after another; return when each arrival's picture was done."""
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
    """Submit every request to the engine as it arrives; return when each picture was done."""
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
