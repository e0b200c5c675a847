from __future__ import annotations

import pytest
import torch

from dreambooth.serving.engine import row_limits
from dreambooth.serving.engine.row_limits import (
    CALLS_BEFORE_RAISE,
    RowLimit,
    advice,
)


def test_a_lost_device_is_distinguished_from_full_memory() -> None:
    assert row_limits.is_device_lost(torch.AcceleratorError("device-side assert"))
    assert not row_limits.is_device_lost(torch.AcceleratorError("CUDA error: out of memory"))
    assert not row_limits.is_device_lost(RuntimeError("device-side assert"))


def test_the_cap_halves_down_to_one_row() -> None:
    cap = RowLimit(12)
    assert [(cap.halve(12), cap.rows), (cap.halve(6), cap.rows)] == [(True, 6), (True, 3)]
    assert [(cap.halve(3), cap.rows), (cap.halve(1), cap.rows)] == [(True, 1), (False, 1)]


def test_a_small_call_that_fails_halves_what_was_tried() -> None:
    cap = RowLimit(16)
    assert cap.halve(4)
    assert cap.rows == 2


def succeed(cap: RowLimit, times: int) -> None:
    for _ in range(times):
        cap.succeeded(cap.rows)


def test_after_enough_full_calls_more_rows_are_tried_again() -> None:
    cap = RowLimit(8)
    cap.halve(8)
    succeed(cap, CALLS_BEFORE_RAISE - 1)
    cap.succeeded(2)  # not a full call, so it does not count
    assert cap.rows == 4
    succeed(cap, 1)
    assert cap.rows == 8
    succeed(cap, 10 * CALLS_BEFORE_RAISE)
    assert cap.rows == 8


def test_a_raise_that_goes_wrong_makes_more_patient() -> None:
    cap = RowLimit(8)
    cap.halve(8)
    succeed(cap, CALLS_BEFORE_RAISE)
    cap.halve(8)
    succeed(cap, CALLS_BEFORE_RAISE)
    assert cap.rows == 4
    succeed(cap, CALLS_BEFORE_RAISE)
    assert cap.rows == 8


@pytest.mark.parametrize(
    ("size", "known", "words"),
    [
        ((1024, 1024), 0, "512 x 512 should fit"),
        ((1024, 1024), 768 * 768, "768 x 768 should fit"),
        ((1024, 512), 512 * 512, "720 x 360 should fit"),
        ((2048, 2048), 64 * 64, "1024 x 1024 should fit"),
        ((8, 8), 0, "no smaller size is left"),
        ((16, 8), 0, "8 x 8 should fit"),
    ],
)
def test_the_advice_names_a_size_below(size: tuple[int, int], known: int, words: str) -> None:
    assert words in advice(*size, unit=8, fitted_pixels=known)
