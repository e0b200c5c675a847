"""Write tables in Markdown whose cells are means over seeds with their spread."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond these the normal
# distribution's quantile is used.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean and the 95 % interval of Student's t over seeds (None for a single seed)."""
    mean, count = statistics.fmean(values), len(values)
    rounded = [round(value, 4) for value in values]
    if count < 2:
        return {"mean": round(mean, 4), "low": None, "high": None, "values": rounded}
    t = _T[count - 2] if count - 2 < len(_T) else statistics.NormalDist().inv_cdf(0.975)
    half = t * statistics.stdev(values) / math.sqrt(count)
    return {
        "mean": round(mean, 4),
        "low": round(mean - half, 4),
        "high": round(mean + half, 4),
        "values": rounded,
    }


def cell(values: Sequence[float], *, most: float = 1.0) -> str:
    """Return the mean over seeds, and behind it what `spread` says, within 0..most."""
    found = over_seeds(values)
    if len(values) == 1:
        return number(found["mean"])
    if len(values) == 2:
        return f"{number(found['mean'])} ({', '.join(map(number, values))})"
    low, high = max(0.0, found["low"]), min(most, found["high"])
    return f"{number(found['mean'])} ({number(low)} to {number(high)})"


def spread(seeds: int) -> str:
    """Return what stands in the brackets of a cell over so many seeds; "" without brackets."""
    if seeds < 2:
        return ""
    if seeds == 2:
        return "in brackets both seeds"
    return "in brackets the 95 % interval of Student's t over the seeds, cut to what is possible"


def number(value: float) -> str:
    """Return a number with two decimals, a share without the 0 before its point."""
    return f"{value:.2f}".removeprefix("0") if 0 <= value < 1 else f"{value:.2f}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; each row has as many cells as the head."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
