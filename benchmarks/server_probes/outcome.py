"""The result of a probe: figures, some with a bound that they must keep, and faults."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One number, with its unit at the end of its name; at_most, at_least: its bounds."""

    name: str
    value: float
    at_most: float | None = None
    at_least: float | None = None

    @property
    def holds(self) -> bool:
        """Return whether the bounds are kept; NaN keeps none."""
        high = self.at_most is not None and self.value > self.at_most
        low = self.at_least is not None and self.value < self.at_least
        return not (high or low or math.isnan(self.value))

    @property
    def bar(self) -> str:
        """Return the bound in words, empty without one."""
        if self.at_most is not None:
            return f"<= {self.at_most:g}"
        return "" if self.at_least is None else f">= {self.at_least:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeOutcome:
    """The figures of one probe; faults: one sentence each, and there should be none."""

    probe: str
    figures: tuple[Figure, ...]
    faults: tuple[str, ...] = ()

    @property
    def failed(self) -> tuple[str, ...]:
        """Return a sentence for everything that is not as it should be."""
        passed = (f"{f.name} is {f.value:g}, not {f.bar}" for f in self.figures if not f.holds)
        return (*passed, *self.faults)

    def value(self, name: str) -> float:
        """Return the figure of that name. Raises KeyError if there is none."""
        return {figure.name: figure.value for figure in self.figures}[name]


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the percentile by nearest rank; NaN without values.

    It is the smallest value that at least `percent` % of all values do not exceed.
    """
    if not values:
        return math.nan
    place = math.ceil(len(values) * percent / 100) - 1
    return sorted(values)[max(0, place)]
