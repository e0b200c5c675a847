"""At which readings of the meter something turns."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from dreambooth.training.early_stopping import GUIDANCE_LIMIT
from dreambooth.training.meter import BINS, MeterReading
from dreambooth.training.turns import CONVERGED, turn, turns

BURNT = GUIDANCE_LIMIT + 0.01


def readings(
    losses: Sequence[float],
    *,
    guidance: Sequence[float] = (),
    convergence: Sequence[float | None] = (),
) -> list[MeterReading]:
    return [
        MeterReading(
            step=10 * number,
            loss=loss,
            losses=(loss,) * BINS,
            drifts={"class": 0.2, "other_class": 0.2, "empty": 0.2},
            moved=0.1,
            guidance=guidance[number - 1] if guidance else 1.0,
            convergence=convergence[number - 1] if convergence else None,
        )
        for number, loss in enumerate(losses, start=1)
    ]


def numbers(found: Sequence[MeterReading]) -> list[int]:
    """Return which readings, from 1 on, something turns at."""
    return [n for n in range(1, len(found) + 1) if turn(found[:n]) is not None]


def test_nothing_turns_while_the_loss_falls_and_all_is_good() -> None:
    assert numbers(readings([0.9, 0.8, 0.8, 0.7])) == []


def test_it_turns_at_the_first_bad_reading_and_again_after_good_ones() -> None:
    found = readings([0.9] * 6, guidance=[1, BURNT, BURNT, 1, BURNT, BURNT])
    assert numbers(found) == [2, 5]
    assert turns(found) == 2
    assert "pictures burn" in (turn(found[:2]) or "")
    assert numbers(readings([0.9, 0.8], guidance=[BURNT, BURNT])) == [1]


def test_it_turns_once_where_the_loss_has_converged() -> None:
    there = [None, CONVERGED, CONVERGED - 0.01, 0.9, 0.1]
    found = readings([0.9, 0.8, 0.7, 0.6, 0.5], convergence=there)
    assert numbers(found) == [3]
    assert "DVAR" in (turn(found[:3]) or "")


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([0.9, 0.8, 0.85, 0.87, 0.9], [4]),  # what rises on is no turn
        ([0.9, 0.8, 0.85, 0.82, 0.84], [4]),  # nor what falls and stays above the lowest
        ([0.9, 0.8, 0.85, 0.7, 0.75, 0.6], []),  # a single one above it tells nothing
        ([0.9, 0.8, 0.85, 0.82, 0.7, 0.75, 0.71], [4, 7]),
        ([1.1, 1.2, 1.3], []),  # it had not been falling
        ([0.9, 1.1, 1.1], [3]),
    ],
)
def test_it_turns_where_the_loss_rises_from_its_lowest(
    losses: list[float], expected: list[int]
) -> None:
    assert numbers(readings(losses)) == expected
