"""Describe the engine in gauges and counters, on their way from its process to /metrics."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """The gauges and counters (``*_total``) of an engine; sent, it is also a sign of life.

    queued_pictures: pictures that have not begun. running_rows: U-Net rows of those that still take
    steps. undecoded: pictures that wait for the VAE. calls_total: rounds with a U-Net call (or its
    halves, where memory was short); like pictures_total it counts from the first request on,
    out_of_memory_total from the warm-up on. dropped_lines_total: lines of the process's log that
    were dropped because nobody read them. seconds_per_call: (rows, seconds) of recent calls at the
    model's own resolution, seconds_per_decode of a picture there. rss_bytes: the resident memory of
    the engine's process. While the engine loads, only dropped_lines_total and rss_bytes are set.
    """

    queued_pictures: int = 0
    running_rows: int = 0
    undecoded: int = 0
    calls_total: int = 0
    pictures_total: int = 0
    out_of_memory_total: int = 0
    dropped_lines_total: int = 0
    seconds_per_call: tuple[tuple[int, float], ...] = ()
    seconds_per_decode: float = 0.0
    rss_bytes: int = 0

    def after(self, earlier: EngineStatus) -> EngineStatus:
        """Return this status with the counters of the engines before it added."""
        counters = [field.name for field in fields(self) if field.name.endswith("_total")]
        sums = {name: getattr(self, name) + getattr(earlier, name) for name in counters}
        return replace(self, **sums)
