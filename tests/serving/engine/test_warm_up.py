from __future__ import annotations

import pytest

from dreambooth.serving.engine.warm_up import measure, rows_that_pay

# Published times of one guided call (two rows per picture) at 512 x 512 with torch 2.0 nightly,
# compiled, as (pictures, seconds); the H100's are a fit.
T4 = [(1, 1 / 7.56), (4, 1 / 1.99), (16, 2.3)]
V100 = [(1, 1 / 22.2), (4, 1 / 6.9), (16, 1 / 1.9)]
A100 = [(b, (7.5 + 12.6 * b) / 1000) for b in (1, 2, 4, 8, 16)]
H100 = [(b, (5.0 + 4.6 * b) / 1000) for b in (1, 2, 4, 8, 16)]


@pytest.mark.parametrize(
    ("curve", "pictures"), [(T4, 1), (V100, 4), (A100, 8), (H100, 16)], ids=str
)
def test_the_largest_batch_that_pays_on_published_curves(
    curve: list[tuple[int, float]], pictures: int
) -> None:
    assert rows_that_pay([(2 * b, seconds) for b, seconds in curve]) == 2 * pictures


def test_a_doubling_that_does_not_pay_is_jumped_where_the_next_pays_for_both() -> None:
    assert rows_that_pay([(1, 1.0), (2, 2.0), (4, 2.4)]) == 4
    assert rows_that_pay([(1, 1.0), (2, 2.0), (4, 3.9)]) == 1


def test_a_single_point_is_taken() -> None:
    assert rows_that_pay([(1, 5.0)]) == 1


class Device:
    """A clock that a call advances by a time per row."""

    def __init__(self, seconds_per_row: float, *, first: float = 0.0, most: int = 1000) -> None:
        self.now, self.seconds_per_row, self.most = 0.0, seconds_per_row, most
        self.first = first
        self.calls: list[int] = []

    def __call__(self, rows: int) -> None:
        if rows > self.most:
            raise MemoryError
        self.calls.append(rows)
        self.now += rows * self.seconds_per_row + self.first
        self.first = 0.0

    def clock(self) -> float:
        return self.now


def test_the_quickest_of_three_calls_counts() -> None:
    device = Device(0.1, first=0.5)
    curve = measure(device, most_rows=4, budget_s=100, clock=device.clock)
    assert curve == ((1, pytest.approx(0.1)), (2, pytest.approx(0.2)), (4, pytest.approx(0.4)))
    assert device.calls == [1] * 3 + [2] * 3 + [4] * 3


def test_a_first_call_that_took_long_is_made_again_where_the_budget_allows() -> None:
    device = Device(0.1, first=2.0)
    curve = measure(device, most_rows=1, budget_s=10, clock=device.clock)
    assert curve == ((1, pytest.approx(0.1)),)
    assert device.calls == [1, 1]
    device = Device(0.1, first=3.0)
    measure(device, most_rows=1, budget_s=10, clock=device.clock)
    assert device.calls == [1]


def test_slow_devices_are_measured_as_far_as_the_budget_lasts() -> None:
    device = Device(5.0)
    assert measure(device, most_rows=16, budget_s=10, clock=device.clock) == ((1, 5.0),)
    assert device.calls == [1]


def test_the_curve_ends_where_memory_does() -> None:
    device = Device(0.1, most=2)
    curve = measure(device, most_rows=16, budget_s=100, clock=device.clock)
    assert [rows for rows, _ in curve] == [1, 2]


def test_a_device_that_cannot_take_one_row_is_reported() -> None:
    device = Device(0.1, most=0)
    with pytest.raises(MemoryError):
        measure(device, most_rows=16, budget_s=100, clock=device.clock)
