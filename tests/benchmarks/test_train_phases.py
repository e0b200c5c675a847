"""Time and memory of phases, read in the watched process; nvidia-smi and the GPU are faked."""

from __future__ import annotations

import os
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.train_step import phases, processes
from dreambooth.report.timings import Timings

MIB = 2**20


def test_each_peak_is_that_of_the_innermost_phase() -> None:
    # (allocated, reserved) since the previous reading.
    read = iter([None, (9, 10), (3, 4), (7, 8), (1, 2)])
    ticks = iter([0.0, 1.0, 2.0, 5.0, 7.0, 7.5])
    held = iter([50, 20])
    watch = phases.Watch(
        peaks=lambda: next(read), process_memory=lambda: next(held), clock=lambda: next(ticks)
    )
    with watch.phase("training"), watch.phase("sample pictures"):
        watch._read_process_memory()
    found = watch.found()
    assert (found["allocated"], found["reserved"], found["process"]) == (9, 10, 50)
    assert found["phases"] == {
        "training": {
            "seconds": 3.0,
            "times": 1,
            "allocated": 9,
            "reserved": 10,
            "process": None,
        },
        "sample pictures": {
            "seconds": 3.0,
            "times": 1,
            "allocated": 3,
            "reserved": 4,
            "process": 50,
        },
    }


def test_a_peak_that_the_job_sets_back_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"up": False, "peak": 3}
    cuda = SimpleNamespace(
        is_initialized=lambda: state["up"],
        max_memory_allocated=lambda: state["peak"],
        max_memory_reserved=lambda: 2 * state["peak"],
        reset_peak_memory_stats=lambda *_: state.update(peak=1),
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    peaks = phases.TorchPeaks()
    assert peaks() is None
    state["up"] = True
    assert peaks() == (3, 6)
    state["peak"] = 9
    cuda.reset_peak_memory_stats("cuda:0")
    state["peak"] = 5
    assert peaks() == (9, 18)
    assert peaks() == (1, 2)


def test_a_jobs_own_phases_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Timings, "phase", Timings.phase)  # restored after the test
    watch = phases.Watch(peaks=lambda: None, process_memory=lambda: None)
    phases.listen(watch)
    timings = Timings()
    for _ in range(2):
        with timings.phase("export"):
            pass
    assert [name for name, _ in timings.phases()] == ["export"]
    assert watch.found()["phases"]["export"]["times"] == 2


def run(folder: Path, said: str) -> processes.Ended:
    script = folder / "script.py"
    script.write_text(textwrap.dedent(said))
    return processes.run(script, [], folder=folder / "run")


def test_the_whole_process_is_asked_of_the_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '1, 99'\necho \"$PPID, 1500\"\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    said = """
        import time
        from dreambooth.report.timings import Timings
        with Timings().phase("training"):
            time.sleep(2.5)
    """
    ended = run(tmp_path, said)
    assert ended.fault() is None
    assert ended.memory is not None
    assert ended.memory.process == 1500 * MIB
    training = ended.memory.phases["training"]
    assert (training.process, training.times, training.allocated) == (1500 * MIB, 1, None)
    assert training.seconds > 2.4


def test_without_a_driver_the_free_memory_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    ended = run(tmp_path, "import threading; print(threading.active_count())")
    assert [line.text for line in ended.lines] == ["1"]
    assert ended.memory is not None
    assert (ended.memory.process, dict(ended.memory.phases)) == (None, {})
