"""Find the readings of the meter at which something turns, where pictures tell most.

Three things turn: a reading is the first bad one (`early_stopping.fault`) after good ones; it is
the first at which the loss has converged by DVAR's criterion; its loss at fixed noise is the second
in a row above the lowest so far (a single one is often above it by chance).
"""

from __future__ import annotations

from collections.abc import Sequence

from dreambooth.training.early_stopping import IN_A_ROW, fault
from dreambooth.training.meter import MeterReading

CONVERGED = 0.4
"""Of `convergence`: below it DVAR ends a run (arXiv 2302.04841, section 4.2)."""


def turn(readings: Sequence[MeterReading]) -> str | None:
    """Return what turns at the last of these readings, in words; None if nothing does."""
    *earlier, last = readings
    found = fault(last, earlier)
    if found is not None and not (earlier and fault(earlier[-1], earlier[:-1])):
        return found
    if _has_converged(last) and not any(map(_has_converged, earlier)):
        return f"the loss at fixed noise has converged (DVAR's criterion is below {CONVERGED:g})"
    losses = [1.0, *(one.loss for one in readings)]  # the base's is 1
    before, above = losses[:-IN_A_ROW], losses[-IN_A_ROW:]
    if len(before) > 1 and before[-1] == min(before) < min(above):
        return f"the loss at fixed noise rises from its lowest, {before[-1]:.3f}"
    return None


def turns(readings: Sequence[MeterReading]) -> int:
    """Return at how many of these readings something turns."""
    return sum(turn(readings[: number + 1]) is not None for number in range(len(readings)))


def _has_converged(reading: MeterReading) -> bool:
    return reading.convergence is not None and reading.convergence < CONVERGED
