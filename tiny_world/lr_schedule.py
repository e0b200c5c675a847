"""A learning-rate schedule over wall-clock time: linear warm-up, then half a cosine.

Pre-training must end within a given time on any machine, so progress is measured in seconds
instead of steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable


class TimedLrSchedule:
    """The progress and the learning rate of a training with a fixed length in seconds.

    peak: the highest learning rate. spent_s: the seconds of earlier starts, from a checkpoint.
    """

    def __init__(
        self,
        seconds: float,
        peak: float,
        *,
        warmup_share: float = 0.02,
        floor_share: float = 0.01,
        spent_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._seconds, self._peak = seconds, peak
        self._warmup_share, self._floor_share = warmup_share, floor_share
        self._clock = clock
        self._start = clock() - spent_s

    @property
    def spent_s(self) -> float:
        """Return the seconds spent so far, earlier starts included."""
        return self._clock() - self._start

    @property
    def share(self) -> float:
        """Return the share of the time that is spent, 0..1."""
        return min(1.0, self.spent_s / self._seconds)

    @property
    def time_is_up(self) -> bool:
        """Return whether the time is spent."""
        return self.share >= 1.0

    def learning_rate(self) -> float:
        """Return the learning rate for the present moment."""
        share = self.share
        if share < self._warmup_share:
            return self._peak * max(share / self._warmup_share, 0.01)
        progress = (share - self._warmup_share) / (1 - self._warmup_share)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self._peak * (self._floor_share + (1 - self._floor_share) * cosine)
