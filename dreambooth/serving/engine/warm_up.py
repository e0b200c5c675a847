"""Before the first request: how long a U-Net call of so many rows takes, and how many pay."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# A doubling of the rows must raise the rows per second by so much. A T4 gains 3 % from it, an
# A100 5 to 20 % up to 16 guided pictures.
GAIN = 1.05
CALLS = 3
ENOUGH_SECONDS = 1.0  # per number of rows: calls of a second are not repeated
# But for the first, which may have built things (kernels, a CUDA graph): up to this share of the
# budget it is made again.
BUILDING = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmUp:
    """What was measured. seconds_per_step: (U-Net rows, seconds of one call), at the model's own
    resolution. rows: the most that one call will have. seconds_per_decode: of one picture.
    positions_matter: exact mode only, whether a row's place in a call changes its last bits here.
    """

    seconds_per_step: tuple[tuple[int, float], ...]
    rows: int
    seconds_per_decode: float
    positions_matter: bool = False


def measure(
    call: Callable[[int], None],
    *,
    most_rows: int,
    budget_s: float,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[tuple[int, float], ...]:
    """Time call(rows) for 1, 2, 4, ... rows; at least for 1, then as long as the budget lasts.

    `call` returns when the device has finished; it raises MemoryError where so many rows do not
    fit, which ends the curve. The quickest of a few calls counts: the first one builds things.
    """
    curve: list[tuple[int, float]] = []
    began = clock()
    rows = 1
    while rows <= most_rows:
        if curve and clock() - began + 2 * CALLS * curve[-1][1] > budget_s:
            break
        try:
            curve.append((rows, _quickest(call, rows, budget_s, clock)))
        except MemoryError:
            if not curve:
                raise
            break
        rows *= 2
    return tuple(curve)


def _quickest(
    call: Callable[[int], None], rows: int, budget_s: float, clock: Callable[[], float]
) -> float:
    times: list[float] = []
    while len(times) < CALLS:
        began = clock()
        call(rows)
        times.append(clock() - began)
        built = len(times) == 1 and times[0] <= BUILDING * budget_s
        if sum(times) >= ENOUGH_SECONDS and not built:
            break
    return min(times)


def rows_of_a_call(curve: Sequence[tuple[int, float]]) -> int:
    """Return the most rows that a call should have: those that pay, but room for a guided picture.

    Fewer than two would tear its halves apart.
    """
    return max(2, rows_that_pay(curve))


def rows_that_pay(curve: Sequence[tuple[int, float]], *, gain: float = GAIN) -> int:
    """Return the largest measured number of rows whose rows per second make it worth waiting for.

    From one candidate to the next it must gain `gain` for every doubling in between: larger
    batches make every picture in them slower.
    """
    best, best_rate = curve[0][0], curve[0][0] / curve[0][1]
    for rows, seconds in curve[1:]:
        rate = rows / seconds
        if rate >= best_rate * gain ** math.log2(rows / best):
            best, best_rate = rows, rate
    return best
