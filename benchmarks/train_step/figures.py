"""Compute milliseconds per step in the same way for our runs and the peer's."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """The times of the measured steps; mean_ms includes the work between steps, such as reports."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    mean_ms: float


def step_times(
    ends: Sequence[float], *, warm_up: int, milliseconds: Sequence[float] | None = None
) -> StepTimes:
    """Return the step times without the first `warm_up` (>= 1) steps.

    ends: the moment in seconds at which each step ended. milliseconds: each step's own time, used
    for the median and the deciles if the run reports it.
    """
    measured = ends[warm_up - 1 :]
    if milliseconds is None:
        pairs = itertools.pairwise(measured)
        single = [1000 * (after - before) for before, after in pairs]
    else:
        single = list(milliseconds[warm_up:])
    deciles = statistics.quantiles(single, n=10, method="inclusive")
    return StepTimes(
        median_ms=statistics.median(single),
        p10_ms=deciles[0],
        p90_ms=deciles[-1],
        mean_ms=1000 * (measured[-1] - measured[0]) / (len(measured) - 1),
    )
