"""The parent of several processes, with stand-ins that start in milliseconds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from dreambooth.errors import DreamBoothError, HyperparameterError, ResourceError, UserError
from dreambooth.job import workers
from dreambooth.job.meeting import Meeting
from dreambooth.job.workers import WORKER, FromParent, Group
from dreambooth.process.stop import Stopped, StopSignals
from dreambooth.settings.container import Hosts

GROUP = Group(on_each_host=2, port=29_501)
# It ends at the first signal, which is late in the process of rank 0.
STOPPING = """
def stop(number, frame):
    time.sleep(0.3 * (rank == 0)); print("whole" * (rank == 0), flush=True); sys.exit(128 + number)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, stop)
print("ready", flush=True); time.sleep(60)
"""
Run = Callable[[str], None]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs two processes of a program, with `rank` and `tell`, as a job."""

    def start(argv: Sequence[str], environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
        (program,) = argv
        known = "import os, signal, sys, time; rank = int(os.environ['RANK'])\n"
        return subprocess.Popen(
            [sys.executable, "-S", "-c", known + program], env=environ, start_new_session=True
        )

    monkeypatch.setattr(workers, "_start", start)
    monkeypatch.setattr(workers, "LAST_S", 1.0)
    stop = StopSignals(leave=lambda code: None)

    def job(program: str) -> None:
        with stop.listening(), Meeting(Hosts()) as meeting:
            workers.run(
                *([program], os.environ, GROUP),
                model_folder=tmp_path,
                workspace=tmp_path,
                shown_plan="",
                meeting=meeting,
                stop=stop,
            )

    return job


def test_processes_that_end_well_end_the_job_well(run: Run) -> None:
    run("assert os.environ['WORLD_SIZE'] == os.environ['LOCAL_WORLD_SIZE'] == '2'")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_waits_for_the_last_file(
    run: Run, number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    def send() -> None:
        shown = ""
        while shown.count("ready") < 2:
            time.sleep(0.02)
            shown += capfd.readouterr().out
        os.kill(os.getpid(), number)

    threading.Thread(target=send).start()
    with pytest.raises(Stopped) as stopped:
        run(STOPPING)
    assert stopped.value.exit_code == 128 + number
    shown = capfd.readouterr()
    assert "whole" in shown.out
    assert shown.err == ""


def test_a_stop_that_the_processes_agreed_on_is_the_jobs(run: Run) -> None:
    with pytest.raises(Stopped, match="SIGTERM"):
        run("sys.exit(143)")


def test_a_killed_process_ends_the_others_and_is_named(run: Run) -> None:
    began = time.monotonic()
    with pytest.raises(ResourceError, match="ended by SIGKILL, and the other with it"):
        run("rank or os.kill(os.getpid(), signal.SIGKILL); time.sleep(60)")
    assert time.monotonic() - began < 20


def test_a_killed_process_is_named_where_all_have_ended_at_the_next_look(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_POLL_S", 2.0)
    lost = repr(RuntimeError("Connection closed by peer"))
    with pytest.raises(ResourceError, match="ended by SIGKILL, and the other with it"):
        run(
            "from dreambooth.job.workers import FromParent\n"
            "rank and os.kill(os.getpid(), signal.SIGKILL)\n"
            f"FromParent.read(os.environ).tell({lost}); sys.exit(1)"
        )


def _fails(error: Exception, *, of_rank: int = 1) -> str:
    """Return a program whose one rank tells an error, after the other has lost its connection."""
    lost = repr(RuntimeError("Connection closed by peer"))
    faults = getattr(error, "faults", None)
    told = f"HyperparameterError({faults!r})" if faults else repr(error)
    return (
        f"from dreambooth.job.workers import FromParent; from dreambooth.errors import *\n"
        f"time.sleep(0.3 * (rank == {of_rank}))\n"
        f"FromParent.read(os.environ).tell({told} if rank == {of_rank} else {lost}); sys.exit(1)"
    )


@pytest.mark.parametrize(
    "error",
    [
        UserError("The picture cannot be read."),
        ResourceError("The disk is full."),
        HyperparameterError(["seed is wrong.", "epochs is wrong."]),
    ],
)
def test_a_sentence_for_the_user_counts_more_than_what_followed(
    run: Run, error: DreamBoothError, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DreamBoothError) as raised:
        run(_fails(error))
    assert str(raised.value) == str(error)
    assert getattr(raised.value, "faults", None) == getattr(error, "faults", None)
    assert capfd.readouterr().err == ""


def test_a_bug_of_ours_is_shown_with_one_trace(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    error = ZeroDivisionError("by zero")
    with pytest.raises(DreamBoothError, match="InternalError: ZeroDivisionError: by zero"):
        run(_fails(error, of_rank=0))
    assert capfd.readouterr().err.count("ZeroDivisionError") == 1


def test_the_interface_is_used_where_it_exists_and_nobody_chose_another() -> None:
    def of(interface: str, **environ: str) -> list[str | None]:
        group = Group(on_each_host=1, hosts=2, port=1, interface=interface)
        variables = group.variables(0, environ)
        return [variables.get(f"{name}_SOCKET_IFNAME") for name in ("NCCL", "GLOO")]

    assert of("lo") == ["lo", "lo"]
    assert of("ethwe") == [None, None]
    assert of("lo", NCCL_SOCKET_IFNAME="eth1") == ["eth1", "lo"]


def test_what_a_process_is_told_is_what_it_reads(tmp_path: Path) -> None:
    worker = FromParent(
        parent=7,
        model_folder=tmp_path / "ü",
        workspace=tmp_path,
        end_file=tmp_path / "end",
        is_main=True,
        shown_plan="Plan\n",
    )
    assert FromParent.read({WORKER: worker.as_text()}) == worker
    assert FromParent.read({}) is None
    ranks = [Group(on_each_host=4, hosts=2, host=1, port=1).variables(n, {}) for n in range(4)]
    assert [one["RANK"] for one in ranks] == ["4", "5", "6", "7"]
    assert {one["WORLD_SIZE"] for one in ranks} == {"8"}
