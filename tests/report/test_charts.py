"""Charts: what is drawn and where, and texts or numbers that must not break them."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreambooth.report import charts
from dreambooth.report.charts import Series, line_chart

FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def paths(svg: str) -> list[list[tuple[float, float]]]:
    """Return the points of each curve in units of the view box."""
    return [
        [(float(x), float(y)) for x, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", path.get("d", ""))]
        for group in parsed(svg).iter("g")
        for path in group.iter("path")
    ]


def test_a_curve_runs_from_the_lower_left_to_the_upper_right() -> None:
    (line,) = paths(line_chart([Series(label="a", x=[1, 2, 3], y=[0, 1, 2])], label="a"))
    assert line[0][0] < line[1][0] < line[2][0]
    assert line[0][1] > line[1][1] > line[2][1]  # in SVG, y grows downwards


def test_smoothed_curves_keep_every_step_as_a_faint_dot() -> None:
    values = [float(number % 7) for number in range(100)]
    svg = line_chart([Series(label="a", x=range(100), y=values, smoothed=True)], label="a")
    dots, line = paths(svg)
    assert len(dots) == len(line) == 100
    spread = [max(y for _, y in one) - min(y for _, y in one) for one in (dots, line)]
    assert spread[1] < spread[0] / 2


def test_moving_means_are_means_of_the_window() -> None:
    values = [float(number**2) for number in range(200)]
    means = charts.moving_mean(values)
    half = charts.smoothing_window(200) // 2
    assert half == 10
    assert means[100] == pytest.approx(sum(values[90:111]) / 21)
    assert means[0] == pytest.approx(sum(values[:11]) / 11)
    assert means[-1] == pytest.approx(sum(values[-11:]) / 11)


def test_few_values_are_joined_as_they_are() -> None:
    assert charts.moving_mean([1.0, 5.0, 2.0]) == [1.0, 5.0, 2.0]


def test_thinning_keeps_the_spikes_and_the_order() -> None:
    points = [(float(x), 0.0) for x in range(10_000)]
    points[4321] = (4321.0, 99.0)
    kept = charts.thinned(points, 600)
    assert len(kept) <= 600
    assert (4321.0, 99.0) in kept
    assert kept == sorted(kept)
    assert charts.thinned(points[:600], 600) == points[:600]


def test_a_long_run_makes_no_large_chart() -> None:
    values = [math.sin(number) + 1 for number in range(100_000)]
    svg = line_chart([Series(label="a", x=range(100_000), y=values, smoothed=True)], label="a")
    assert len(svg) < 30_000


def test_a_blow_up_is_shown_on_a_logarithmic_axis() -> None:
    values = [0.1] * 50 + [10.0**power for power in range(6)]
    svg = line_chart([Series(label="a", x=range(56), y=values)], label="a", marks=[(56, "stopped")])
    assert "logarithmic" in svg
    assert "stopped" in svg
    (line,) = paths(svg)
    rises = [a[1] - b[1] for a, b in pairwise(line[50:])]
    # Equal steps on a logarithmic axis.
    assert rises == pytest.approx([rises[0]] * len(rises), abs=0.2)


def test_texts_of_marks_that_are_close_together_stand_below_each_other() -> None:
    marks = [(56, "stopped"), (55, "kept")]
    svg = line_chart([Series(label="a", x=range(56), y=range(56))], label="a", marks=marks)
    high, low = (re.search(rf'y="(\d+)"[^>]*>{text}<', svg) for _, text in marks)
    assert high is not None
    assert low is not None
    assert int(low[1]) - int(high[1]) >= 12  # the size of the letters


def test_values_that_are_not_finite_are_left_out() -> None:
    (line,) = paths(line_chart([Series(label="a", x=[1, 2, 3], y=[1, math.nan, 2])], label="a"))
    assert len(line) == 2


@pytest.mark.parametrize("values", [[], [math.nan], [math.inf, math.nan]])
def test_nothing_to_draw_is_reported(values: list[float]) -> None:
    svg = line_chart([Series(label="a", x=range(len(values)), y=values)], label="a")
    assert "no values" in svg
    parsed(svg)


@pytest.mark.parametrize("last", [8, 40, 400, 4000, 20_000])
def test_the_last_step_stays_whole_at_the_right_end(last: int) -> None:
    svg = line_chart([Series(label="a", x=[0, last], y=[1, 2])], label="a")
    (label,) = [text for text in parsed(svg).iter("text") if text.text == f"{last}"]
    assert label.get("text-anchor") == "middle"
    half = 8 * len(str(last)) / 2  # a digit of size 12 is about 7 units wide
    assert float(label.get("x", "nan")) + half <= charts.WIDTH - 1
    assert float(label.get("x", "nan")) > charts.WIDTH - 40


def test_texts_are_escaped() -> None:
    evil = '<script>"&'
    series = [Series(label=evil, x=[1, 2], y=[1, 2])]
    svg = line_chart(series, label=evil, x_label=evil, marks=[(1, evil)])
    assert "<script" not in svg
    assert parsed(svg).get("aria-label") == evil


@given(st.lists(FINITE, min_size=1, max_size=60), st.booleans())
def test_whatever_the_values_every_point_lies_within_the_chart(
    values: list[float], smoothed: bool
) -> None:
    series = Series(label="a", x=range(len(values)), y=values, smoothed=smoothed)
    for points in paths(line_chart([series], label="a")):
        for x, y in points:
            assert -1 <= x <= charts.WIDTH + 1
            assert -1 <= y <= charts.HEIGHT + 1


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.5, 1]), (0, 120, [0, 50, 100]), (1, 4, [1, 2, 3, 4]), (0, 1e-4, [0, 5e-5, 1e-4])],
)
def test_ticks_are_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert charts.ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.25, "0.25"), (1e-4, "1e-4"), (2.5e-6, "2.5e-6"), (10_000, "10000"), (1e6, "1e6")],
)
def test_axis_numbers_are_short(value: float, text: str) -> None:
    assert charts.short(value) == text
