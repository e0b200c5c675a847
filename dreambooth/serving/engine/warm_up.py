"""Time U-Net calls before the first request, and choose how many rows a call should have."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# A doubling of the rows must raise the rows per second by this factor. A T4 gains 3 % from it, an
# A100 5 to 20 % up to 16 guided pictures.
GAIN = 1.05
CALLS = 3
ENOUGH_SECONDS = 1.0  # once calls of one number of rows took this long, they are not repeated
# The first call may have built kernels or a CUDA graph. It is repeated even if it took longer than
# ENOUGH_SECONDS, up to this share of the budget.
BUILDING = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmUp:
    """The results of the warm-up.

    seconds_per_call: (U-Net rows, seconds of one call), at the model's own resolution. rows: the
    most that one call will have. seconds_per_decode: of one picture. positions_matter: exact mode
    only, whether a row's position in a call changes its last bits on this device.
    """

    seconds_per_call: tuple[tuple[int, float], ...]
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
    """Time call(rows) for 1 row, then for 2, 4, ... rows as long as the budget lasts.

    `call` returns when the device has finished, and raises MemoryError if the rows do not fit. That
    ends the curve, and is raised again for a single row. The quickest of a few calls counts, since
    the first one builds kernels and graphs.
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
    """Return the most rows that a call should have: `rows_that_pay`, but at least two.

    Fewer would split the two rows of a guided picture into two calls.
    """
    return max(2, rows_that_pay(curve))


def rows_that_pay(curve: Sequence[tuple[int, float]], *, gain: float = GAIN) -> int:
    """Return the largest measured number of rows that raises the rows per second enough.

    From one candidate to the next the rate must grow by the factor `gain` per doubling, because a
    larger batch makes every picture in it slower.
    """
    best, best_rate = curve[0][0], curve[0][0] / curve[0][1]
    for rows, seconds in curve[1:]:
        rate = rows / seconds
        if rate >= best_rate * gain ** math.log2(rows / best):
            best, best_rate = rows, rate
    return best
