"""The most GPU memory that a job takes: in training, to hold beside the plan's figure, and in all.

torch keeps one peak, so it is read and set back where training begins: loading, class images and
encoding come before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class GpuPeak(NamedTuple):
    """Bytes; reserved: with what the allocator holds in pieces that nobody uses."""

    allocated: int = 0
    reserved: int = 0


class GpuPeaks:
    """Asked for `training` and `whole` at any time; without a GPU both stay 0."""

    def __init__(self, take: Callable[[], GpuPeak] | None = None) -> None:
        """take: the peak since it was last called; torch's where none is given."""
        self._take = take or _torch_peak
        self._before = self._training = GpuPeak()
        self._trains = False

    def begin_training(self) -> None:
        """From here on the peak is training's; a second attempt's replaces the first's."""
        self._note()
        self._before = self.whole
        self._training, self._trains = GpuPeak(), True

    @property
    def training(self) -> GpuPeak:
        """Since training began."""
        self._note()
        return self._training

    @property
    def whole(self) -> GpuPeak:
        """Of the whole job so far."""
        self._note()
        return _larger(self._before, self._training)

    def in_words(self) -> str:
        """For the log, beside what the plan expected of training."""
        training, whole = self.training, self.whole
        return (
            f"{_gib(training.allocated)} allocated, {_gib(training.reserved)} reserved in "
            f"training, {_gib(whole.reserved)} reserved in all phases so far"
        )

    def _note(self) -> None:
        found = self._take()
        if self._trains:
            self._training = _larger(self._training, found)
        else:
            self._before = _larger(self._before, found)


def _larger(one: GpuPeak, other: GpuPeak) -> GpuPeak:
    return GpuPeak(*map(max, one, other))


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


def _torch_peak() -> GpuPeak:
    if not torch.cuda.is_available():
        return GpuPeak()
    found = GpuPeak(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
    torch.cuda.reset_peak_memory_stats()
    return found
