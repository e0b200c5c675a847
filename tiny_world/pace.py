"""A learning-rate curve over wall-clock time: linear warm-up, then half a cosine that ends when the
time is spent.

Pre-training must end inside a given time on whatever machine it runs, so progress is a share of
seconds, not of steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable


class Pace:
    """How far a stage is. `spent` seconds may come from a checkpoint of an earlier start of the
    same stage.
    """

    def __init__(
        self,
        seconds: float,
        peak: float,
        *,
        warmup_share: float = 0.02,
        floor_share: float = 0.01,
        spent: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._seconds, self._peak = seconds, peak
        self._warmup_share, self._floor_share = warmup_share, floor_share
        self._clock = clock
        self._start = clock() - spent

    @property
    def spent(self) -> float:
        """Seconds of this stage so far, earlier starts included."""
        return self._clock() - self._start

    @property
    def share(self) -> float:
        """Share of the stage's time that is spent, 0..1."""
        return min(1.0, self.spent / self._seconds)

    @property
    def over(self) -> bool:
        """Whether the time is spent."""
        return self.share >= 1.0

    def learning_rate(self) -> float:
        """The learning rate of this moment."""
        share = self.share
        if share < self._warmup_share:
            return self._peak * max(share / self._warmup_share, 0.01)
        progress = (share - self._warmup_share) / (1 - self._warmup_share)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self._peak * (self._floor_share + (1 - self._floor_share) * cosine)
