"""The time of each phase and the peak of memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dreambooth.report.timings import Timings

ROOT = Path(__file__).parents[2]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_an_inner_phase_stops_the_outer_ones_clock() -> None:
    clock = Clock()
    timings = Timings(clock)
    clock.now = 5.0  # outside all phases
    with timings.phase("training"):
        clock.now = 7.0
        for _ in range(2):
            with timings.phase("sample pictures"):
                clock.now += 10.0
        clock.now += 1.0
    clock.now += 100.0
    with timings.phase("export"):
        clock.now += 4.0
    assert timings.phases() == (("training", 3.0), ("sample pictures", 20.0), ("export", 4.0))


def test_a_phase_that_fails_is_counted() -> None:
    clock = Clock()
    timings = Timings(clock)

    def fail() -> None:
        clock.now = 2.0
        raise ValueError

    with pytest.raises(ValueError), timings.phase("training"), timings.phase("checkpoints"):
        fail()
    assert timings.phases() == (("training", 0.0), ("checkpoints", 2.0))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")
def test_the_peak_of_memory_counts_what_is_already_gone() -> None:
    code = (
        "from dreambooth.report.timings import peak_memory_bytes; before = peak_memory_bytes(); "
        "block = b'x' * 100_000_000; del block; print(before, peak_memory_bytes())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    before, after = map(int, done.stdout.split())
    # The process is small, although a large one started it.
    assert 1_000_000 < before < 100_000_000 < after < 200_000_000
