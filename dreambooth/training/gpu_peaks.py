"""The peak GPU memory of a job: in training, to compare with the training plan, and overall.

torch keeps a single peak, so it is read and reset when training begins; loading, class images and
encoding come before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from dreambooth.limits import size_in_words


class GpuPeak(NamedTuple):
    """Peak bytes; reserved includes what the allocator holds without anyone using it."""

    allocated: int = 0
    reserved: int = 0


class GpuPeaks:
    """The peaks of training and of the whole job, up to now; without a GPU both stay 0."""

    def __init__(self, take: Callable[[], GpuPeak] | None = None) -> None:
        """Take a function that returns the peak since its last call; by default torch's."""
        self._take = take or _torch_peak
        self._before = self._training = GpuPeak()
        self._trains = False

    def begin_training(self) -> None:
        """Count the peak as training's from now on; a second attempt replaces the first one's."""
        self._note()
        self._before = self.whole
        self._training, self._trains = GpuPeak(), True

    @property
    def training(self) -> GpuPeak:
        """Return the peak since training began."""
        self._note()
        return self._training

    @property
    def whole(self) -> GpuPeak:
        """Return the peak of the whole job so far."""
        self._note()
        return _larger(self._before, self._training)

    def in_words(self) -> str:
        """Return both peaks as text for the log, to compare with the expected ones."""
        training, whole = self.training, self.whole
        return (
            f"{size_in_words(training.allocated)} allocated, "
            f"{size_in_words(training.reserved)} reserved in training, "
            f"{size_in_words(whole.reserved)} reserved in all phases so far"
        )

    def _note(self) -> None:
        found = self._take()
        if self._trains:
            self._training = _larger(self._training, found)
        else:
            self._before = _larger(self._before, found)


def _larger(one: GpuPeak, other: GpuPeak) -> GpuPeak:
    return GpuPeak(*map(max, one, other))


def _torch_peak() -> GpuPeak:
    if not torch.cuda.is_available():
        return GpuPeak()
    found = GpuPeak(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
    torch.cuda.reset_peak_memory_stats()
    return found
