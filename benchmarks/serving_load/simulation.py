"""Simulate, without torch, what step-level batching should gain on GPUs that were not available.

Time is counted, not spent. The engine's own code decides which picture joins which call
(`serving.engine.batch_queue`) and how many rows pay (`serving.engine.warm_up`). The time of a call
comes from published figures of a card.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from benchmarks.serving_load import traffic
from benchmarks.serving_load.policies import (
    REQUEST_LEVEL,
    SERIAL,
    STEP_LEVEL,
    Choose,
    VirtualClock,
    alike,
    batch_by_batch,
    oldest,
)
from benchmarks.serving_load.traffic import Arrival, LoadFigures
from dreambooth.diffusion.sampling_request import SamplingRequest
from dreambooth.serving.engine import warm_up
from dreambooth.serving.engine.batch_queue import DECODING_SHARE, BatchQueue

MOST_ROWS = 16  # of a call, as in `engine.MAX_ROWS`
# Decoding a picture of 512 x 512 (2.515e12 operations) / a guided U-Net call of one (1.608e12).
_DECODE_PICTURES = 1.56
_DECODE_PARTS = 18  # the decoder's layers, taken to be equally long


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedCard:
    """A GPU on which a call takes fixed_ms + picture_ms for every guided picture (two rows) in it.

    source: where the two numbers are from. Decoding is taken to be as fast as the U-Net per
    operation.
    """

    name: str
    fixed_ms: float
    picture_ms: float
    source: str

    def call_s(self, rows: int) -> float:
        """Return the seconds of a U-Net call of `rows` rows, Stable Diffusion at 512 x 512."""
        return (self.fixed_ms + self.picture_ms * rows / 2) / 1000

    @property
    def decode_s(self) -> float:
        """Return the seconds of decoding one picture."""
        return (self.fixed_ms + _DECODE_PICTURES * self.picture_ms) / 1000

    def rows(self) -> int:
        """Return how many rows per call the engine's warm-up would allow on this card."""
        clock = VirtualClock()

        def call(rows: int) -> None:
            clock.seconds += self.call_s(rows)

        curve = warm_up.measure(call, most_rows=MOST_ROWS, budget_s=10.0, clock=clock.now)
        return warm_up.rows_of_a_call(curve)


_DIFFUSERS = "fit to its documentation's 1, 4 and 16 pictures, compiled"
CARDS = (
    SimulatedCard(name="T4", fixed_ms=8.4, picture_ms=123.9, source=_DIFFUSERS),
    SimulatedCard(name="V100", fixed_ms=13.0, picture_ms=32.1, source=_DIFFUSERS),
    SimulatedCard(name="A100", fixed_ms=7.5, picture_ms=12.6, source=_DIFFUSERS),
    SimulatedCard(
        name="H100", fixed_ms=5.0, picture_ms=4.6, source="assumed from one picture's times"
    ),
)


@dataclass(slots=True, eq=False)
class Company:
    """The job of a picture as `BatchQueue` reads it; it sets no limit of its own."""

    most_pictures: int | None = None


@dataclass(slots=True, kw_only=True, eq=False)
class Seat:
    """A picture as `serving.engine.batch_queue` sees it.

    calls_left: U-Net calls still to come. parts_left: parts of its decoding still to come after
    them.
    """

    number: int
    size: tuple[int | None, int | None]
    unet_rows: int
    calls_left: int
    parts_left: int
    places: tuple[int, ...] | None = None
    job: Company = field(default_factory=Company)


@dataclass(frozen=True, slots=True, kw_only=True)
class CardResult:
    """The figures of one card.

    gain: pictures per second of step-level batching / those of the serial way, under more load than
    the card can serve. request_level_gain: likewise.
    """

    card: SimulatedCard
    rows: int
    serial_per_s: float
    gain: float
    request_level_gain: float
    figures: list[LoadFigures]


def step_level(
    arrivals: Sequence[Arrival],
    *,
    call_s: Callable[[int], float],
    decode_s: float,
    most_rows: int,
    more_calls: int = 0,
    decode_parts: int = _DECODE_PARTS,
    on_call: Callable[[list[int]], None] | None = None,
) -> list[float]:
    """Simulate the engine's loop; return when each arrival's picture was done.

    more_calls: U-Net calls that the noise scheduler makes besides num_inference_steps (PNDM: 1).
    decode_parts: the parts between which decoding may pause. on_call: called with the arrivals'
    numbers of every U-Net call.
    """
    batch_queue: BatchQueue[Seat] = BatchQueue(lambda _: most_rows)
    undecoded: deque[Seat] = deque()
    finished = [0.0] * len(arrivals)
    clock, come = 0.0, 0
    while come < len(arrivals) or batch_queue.waiting_count or batch_queue.busy or undecoded:
        if not (batch_queue.waiting_count or batch_queue.busy or undecoded):
            clock = max(clock, arrivals[come].seconds)
        while come < len(arrivals) and arrivals[come].seconds <= clock:
            batch_queue.add(_seat(come, arrivals[come].request, more_calls, decode_parts))
            come += 1
        seats, _ = batch_queue.next(admit=len(undecoded) < most_rows)
        began = clock
        if seats:
            clock += call_s(sum(seat.unet_rows for seat in seats))
            if on_call is not None:
                on_call([seat.number for seat in seats])
        for seat in seats:
            seat.calls_left -= 1
            if not seat.calls_left:
                batch_queue.leave(seat)
                undecoded.append(seat)
        if undecoded:
            end = clock + DECODING_SHARE * (clock - began)
            seat, paused = undecoded[0], False
            while seat.parts_left and not paused:
                clock += decode_s / decode_parts
                seat.parts_left -= 1
                paused = clock >= end
            if not seat.parts_left:
                finished[undecoded.popleft().number] = clock
    return finished


def batches(arrivals: Sequence[Arrival], card: SimulatedCard, choose: Choose) -> list[float]:
    """Simulate whole batches on a card; return when each arrival's picture was done."""
    clock = VirtualClock()

    def draw(requests: Sequence[SamplingRequest]) -> Iterator[None]:
        rows = sum(request.unet_rows for request in requests)
        clock.seconds += requests[0].num_inference_steps * card.call_s(rows)
        for _ in requests:
            clock.seconds += card.decode_s
            yield

    return batch_by_batch(arrivals, choose, draw, clock)


def policies(arrivals: Sequence[Arrival], card: SimulatedCard, rows: int) -> dict[str, list[float]]:
    """Return when each picture was done, by policy."""
    return {
        SERIAL: batches(arrivals, card, oldest),
        REQUEST_LEVEL: batches(arrivals, card, alike(rows)),
        STEP_LEVEL: step_level(
            arrivals, call_s=card.call_s, decode_s=card.decode_s, most_rows=rows
        ),
    }


def simulate(card: SimulatedCard, *, pictures: int, seed: int) -> CardResult:
    """Serve `pictures` pictures per load by every policy, and once more all at the same moment."""
    rows = card.rows()
    alone = _at_once(traffic.every_kind(traffic.STEPS))
    serial_per_s = len(alone) / max(batches(alone, card, oldest))
    found: list[LoadFigures] = []
    for load in traffic.LOADS:
        arrivals = traffic.poisson(load * serial_per_s, pictures, steps=traffic.STEPS, seed=seed)
        for policy, finished in policies(arrivals, card, rows).items():
            found.append(traffic.figures(policy, load, arrivals, finished))
    requests = traffic.poisson(1.0, pictures, steps=traffic.STEPS, seed=seed)
    at_once = _at_once([arrival.request for arrival in requests])
    ends = {policy: max(finished) for policy, finished in policies(at_once, card, rows).items()}
    return CardResult(
        card=card,
        rows=rows,
        serial_per_s=serial_per_s,
        gain=ends[SERIAL] / ends[STEP_LEVEL],
        request_level_gain=ends[SERIAL] / ends[REQUEST_LEVEL],
        figures=found,
    )


def _at_once(requests: Sequence[SamplingRequest]) -> list[Arrival]:
    return [Arrival(seconds=0.0, request=request) for request in requests]


def _seat(number: int, request: SamplingRequest, more_calls: int, decode_parts: int) -> Seat:
    return Seat(
        number=number,
        size=(request.width, request.height),
        unet_rows=request.unet_rows,
        calls_left=request.num_inference_steps + more_calls,
        parts_left=decode_parts,
    )
