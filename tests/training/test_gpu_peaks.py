from __future__ import annotations

import pytest
import torch

from dreambooth.training.gpu_peaks import GpuPeak, GpuPeaks


class Allocator:
    """Stands in for torch's counters; on a reset the peak falls back to what is in use."""

    def __init__(self) -> None:
        self.used, self._peak = 0, 0

    def use(self, most: int, left: int) -> None:
        self._peak, self.used = max(self._peak, most), left

    def take(self) -> GpuPeak:
        found, self._peak = GpuPeak(self._peak, 2 * self._peak), self.used
        return found


def test_trainings_peak_is_separate_from_what_came_before_and_none_is_lost() -> None:
    card = Allocator()
    peaks = GpuPeaks(card.take)
    card.use(5, left=3)  # class images and encoding
    assert peaks.whole == (5, 10)
    card.use(6, left=2)
    peaks.begin_training()
    card.use(4, left=2)
    assert peaks.training == (4, 8)
    assert peaks.training == (4, 8)  # reading it changes nothing
    assert peaks.whole == (6, 12)
    card.use(9, left=1)
    assert (peaks.training, peaks.whole) == ((9, 18), (9, 18))


def test_an_attempt_by_a_smaller_plan_has_a_peak_of_its_own() -> None:
    card = Allocator()
    peaks = GpuPeaks(card.take)
    peaks.begin_training()
    card.use(9, left=1)  # the first attempt peaks at 9
    peaks.begin_training()
    card.use(4, left=2)
    assert (peaks.training.allocated, peaks.whole.allocated) == (4, 9)


def test_the_log_tells_training_and_the_whole_job() -> None:
    card = Allocator()
    peaks = GpuPeaks(card.take)
    card.use(6 * 2**30, left=2)
    peaks.begin_training()
    card.use(4 * 2**30, left=2)
    assert peaks.in_words() == (
        "4.00 GiB allocated, 8.00 GiB reserved in training, 12.00 GiB reserved in all phases so far"
    )


def test_torchs_counters_are_read_and_set_back_together(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, count in (("max_memory_allocated", 3), ("max_memory_reserved", 5)):
        monkeypatch.setattr(torch.cuda, name, lambda name=name, n=count: done.append(name) or n)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: done.append("reset"))
    assert GpuPeaks().whole == GpuPeak(allocated=3, reserved=5)
    assert done == ["max_memory_allocated", "max_memory_reserved", "reset"]


def test_without_a_gpu_there_is_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    peaks = GpuPeaks()
    peaks.begin_training()
    assert (peaks.training, peaks.whole) == ((0, 0), (0, 0))
