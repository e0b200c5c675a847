"""Draws line charts as inline SVG strings, with pure functions (standard library only).

A chart has no size of its own: it fills the width that it is given, and its letters are large
enough for a phone. Colours are CSS variables with defaults (--series-1, --series-2, --mark,
--grid); letters have the colour of the text around the chart. Values that are not finite are left
out.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 400, 232  # units of the view box
MAX_POINTS = 600  # drawn per series, at most; the extremes of each stretch are kept
LOG_RATIO = 100.0  # a maximum above this many medians makes the axis logarithmic
MIN_SMOOTHED = 20  # values; a curve of fewer is not smoothed
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 10, 12, 32
_DIGIT = 8  # units; the width of a digit in any browser's font, at most
_COLOURS = (
    *("var(--series-1,#2461c9)", "var(--series-2,#c2570c)", "var(--series-3,#2f855a)"),
    *("var(--series-4,#8a4fb0)", "var(--series-5,#8a6d1a)", "var(--series-6,#0f7c8a)"),
)
_MARK = "var(--mark,#b42318)"
_GRID = "var(--grid,#d9d6cf)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One curve; x and y have the same length, and x ascends.

    smoothed: draw a line of moving means over faint points, not a plain line.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    smoothed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Frame:
    """The ranges of both axes, which map values to units of the view box."""

    x: tuple[float, float]
    y: tuple[float, float]
    logarithmic: bool

    def at(self, x: float, y: float) -> tuple[float, float]:
        low, high = self.y
        if self.logarithmic:
            y, low, high = math.log10(y), math.log10(low), math.log10(high)
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - low) / (high - low)
        left = _LEFT + across * (WIDTH - _LEFT - _RIGHT)
        return left, HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM)


def line_chart(
    series: Sequence[Series],
    *,
    label: str,
    x_label: str = "step",
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """Return a chart as an <svg> element; `label` is its text for screen readers.

    marks: (x, text) of vertical lines. The y axis includes 0, or is logarithmic where all values
    are positive and the largest is above LOG_RATIO medians. Without values the chart reads
    "no values".
    """
    shown = [(one, _finite(one)) for one in series]
    values = [y for _, points in shown for _, y in points]
    head = (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(label)}" font-size="12" fill="currentColor">'
    )
    if not values:
        text = f'<text x="{WIDTH / 2:g}" y="{HEIGHT / 2:g}" text-anchor="middle">no values</text>'
        return f"{head}{text}</svg>"
    positions = [x for _, points in shown for x, _ in points] + [x for x, _ in marks]
    frame = _frame(positions, values)
    parts = [head, _grid(frame, x_label)]
    for number, (one, points) in enumerate(shown):
        parts.append(_curve(frame, one, points, _COLOURS[number % len(_COLOURS)]))
    parts += [_mark(frame, x, text, row) for row, (x, text) in enumerate(marks)]
    parts.append("</svg>")
    return "".join(parts)


def smoothing_window(count: int) -> int:
    """Return how many of `count` values a moving mean takes: an odd number, about a tenth of them.

    1 means that the curve is not smoothed.
    """
    return 1 if count < MIN_SMOOTHED else (count // 10) | 1


def moving_mean(values: Sequence[float]) -> list[float]:
    """Return centred means over `smoothing_window` values, over fewer at the ends."""
    half = smoothing_window(len(values)) // 2
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    means = []
    for index in range(len(values)):
        first, last = max(0, index - half), min(len(values), index + half + 1)
        means.append((sums[last] - sums[first]) / (last - first))
    return means


def thinned(
    points: Sequence[tuple[float, float]], most: int = MAX_POINTS
) -> list[tuple[float, float]]:
    """Return at most `most` points (2 or more), in order; each stretch keeps its extremes."""
    if len(points) <= most:
        return list(points)
    stretches = most // 2
    kept = []
    for number in range(stretches):
        first = number * len(points) // stretches
        last = (number + 1) * len(points) // stretches
        stretch = points[first:last]
        low = min(stretch, key=lambda point: point[1])
        high = max(stretch, key=lambda point: point[1])
        kept += [low] if low == high else sorted((low, high))
    return kept


def ticks(low: float, high: float, *, about: int = 4) -> list[float]:
    """Return round numbers from `low` to `high`, 1, 2 or 5 times a power of ten apart."""
    raw = (high - low) / about
    if raw <= 0 or not math.isfinite(raw):
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((f * power for f in (1, 2, 5) if f * power >= raw * 0.999), 10 * power)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def short(value: float) -> str:
    """Return a number for an axis: 1200000 -> 1.2e6, 0.0001 -> 1e-4, 0.25 -> 0.25."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _finite(one: Series) -> list[tuple[float, float]]:
    return [(x, y) for x, y in zip(one.x, one.y, strict=True) if math.isfinite(y)]


def _frame(positions: Sequence[float], values: Sequence[float]) -> _Frame:
    left, right = min(positions), max(positions)
    if left == right:
        left, right = left - 0.5, right + 0.5
    low, high = min(values), max(values)
    if low > 0 and high > LOG_RATIO * statistics.median(values):
        bottom = 10.0 ** math.floor(math.log10(low))
        return _Frame(x=(left, right), y=(bottom, high * 1.2), logarithmic=True)
    low = min(low, 0.0)
    high = max(high, 0.0)
    if low == high:
        high = low + 1.0
    return _Frame(x=(left, right), y=(low, high + 0.04 * (high - low)), logarithmic=False)


def _grid(frame: _Frame, x_label: str) -> str:
    """Return the SVG of horizontal lines with their values on the left, and of the steps below."""
    low, high = frame.y
    if frame.logarithmic:
        first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high))
        stride = max(1, math.ceil((last - first + 1) / 5))
        levels = [10.0**power for power in range(first, last + 1, stride)]
    else:
        levels = ticks(low, high)
    parts = []
    for level in levels:
        _, y = frame.at(frame.x[0], level)
        parts.append(
            f'<path d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}" stroke="{_GRID}" fill="none"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(level)}</text>'
        )
    for step in (tick for tick in ticks(*frame.x, about=4) if tick.is_integer()):
        label = f"{step:g}"
        x, _ = frame.at(step, frame.y[0])
        x = min(x, WIDTH - 2 - len(label) * _DIGIT / 2)  # keeps the last one inside
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - _BOTTOM + 15}" text-anchor="middle">{label}</text>'
        )
    scale = ", logarithmic" if frame.logarithmic else ""
    parts.append(
        f'<text x="{WIDTH - _RIGHT}" y="{HEIGHT - 3}" text-anchor="end" opacity=".7">'
        f"{escape(x_label + scale)}</text>"
    )
    return "".join(parts)


def _curve(frame: _Frame, one: Series, points: list[tuple[float, float]], colour: str) -> str:
    if not points:
        return ""
    line, dots = points, ""
    if one.smoothed:
        line = _smoothed(points, frame.logarithmic)
        # Dots are lines of length 0: <circle> elements would take ten times as much text.
        path = "".join("M{:.1f} {:.1f}h0".format(*frame.at(*p)) for p in thinned(points))
        dots = (
            f'<path d="{path}" stroke="{colour}" stroke-width="3.5" '
            'stroke-linecap="round" opacity=".3"/>'
        )
    drawn = [frame.at(*point) for point in thinned(line)]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in (drawn if len(drawn) > 1 else drawn * 2))
    return (
        f'<g fill="none"><title>{escape(one.label)}</title>{dots}'
        f'<path d="{path}" stroke="{colour}" stroke-width="2" '
        'stroke-linejoin="round" stroke-linecap="round"/></g>'
    )


def _smoothed(points: list[tuple[float, float]], logarithmic: bool) -> list[tuple[float, float]]:
    """Return points with moving means of y, geometric means on a logarithmic axis."""
    xs = [x for x, _ in points]
    if logarithmic:
        means = [10.0**mean for mean in moving_mean([math.log10(y) for _, y in points])]
    else:
        means = moving_mean([y for _, y in points])
    return list(zip(xs, means, strict=True))


def _mark(frame: _Frame, x: float, text: str, row: int) -> str:
    """Draw a vertical line; the texts stand below each other, as lines may be close together."""
    left, _ = frame.at(x, frame.y[1])
    anchor = "end" if left > WIDTH / 2 else "start"
    shift = -5 if anchor == "end" else 5
    return (
        f'<path d="M{left:.1f} {_TOP}V{HEIGHT - _BOTTOM}" stroke="{_MARK}" '
        'stroke-dasharray="4 3" fill="none"/>'
        f'<text x="{left + shift:.1f}" y="{_TOP + 10 + 14 * row}" text-anchor="{anchor}" '
        f'style="fill:{_MARK}">{escape(text)}</text>'
    )


def legend_colour(number: int) -> str:
    """Return the CSS colour of series `number`, for a legend outside the chart."""
    return _COLOURS[number % len(_COLOURS)]
