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
from dreambooth.job import meeting as meetings
from dreambooth.job import workers
from dreambooth.job.launcher import NotJoinedError
from dreambooth.job.meeting import HostEnd, Meeting
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
MEET = """
from dreambooth.job.workers import FromParent
here = FromParent.read(os.environ)
here.met_file.touch()
while not here.met_file.with_name(f"end-{1 - rank}.met").exists():
    time.sleep(0.02)
"""
Run = Callable[..., None]


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

    def job(program: str, met: Meeting | None = None) -> None:
        with stop.listening(), met or Meeting(Hosts()) as meeting:
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


def test_a_process_that_is_stopped_while_it_starts_stops_the_job(run: Run) -> None:
    with pytest.raises(Stopped, match="SIGTERM"):
        run("rank or os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)")


def test_only_processes_that_have_met_have_time_for_their_last_file(
    run: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(workers, "LAST_S", 30.0)
    monkeypatch.setattr(workers, "_UNMET_S", 0.1)
    writes = "rank and sys.exit(143); time.sleep(1); print('whole'); sys.exit(143)"
    with pytest.raises(Stopped):
        run(writes)
    assert "whole" not in capfd.readouterr().out
    with pytest.raises(Stopped):
        run(MEET + writes)
    assert "whole" in capfd.readouterr().out


def test_processes_that_never_meet_are_named_and_end_the_job(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(meetings, "NOTE_S", 0.5)
    monkeypatch.setattr(meetings, "LONGEST_S", 2.0)

    class OtherHost(Meeting):
        others = ("algo-2",)

    with pytest.raises(UserError, match="The processes of host algo-2 of this job could not be"):
        run("time.sleep(60)", OtherHost(Hosts()))
    noted = "the processes of host algo-2 of this job cannot be reached yet"
    assert caplog.messages.count(noted) == 3
    run(MEET + "time.sleep(3)", OtherHost(Hosts()))


def test_a_host_that_vanishes_is_named(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    class Vanishing(Meeting):
        def poll(self) -> None:
            self.ends["algo-2"] = HostEnd(code=1, sentence="")

    with pytest.raises(UserError, match="host algo-2 of this job has ended: its log"):
        run(_fails(RuntimeError("Connection reset by peer")), Vanishing(Hosts()))
    with pytest.raises(UserError, match="host algo-2 of this job has ended: its log"):
        run("time.sleep(60)", Vanishing(Hosts()))  # and is killed
    assert "Connection" not in capfd.readouterr().err


def test_a_process_that_aborts_has_perhaps_lost_another_host(run: Run) -> None:
    class LateNews(Meeting):
        def wait_for_an_end(self, seconds: float) -> None:
            self.ends["algo-2"] = HostEnd(code=1, sentence="Full.")

    with pytest.raises(UserError, match="On host algo-2: Full"):
        run("rank or os.kill(os.getpid(), signal.SIGABRT); time.sleep(60)", LateNews(Hosts()))
    with pytest.raises(ResourceError, match="ended by SIGKILL"):  # which nobody else does
        run("rank or os.kill(os.getpid(), signal.SIGKILL); time.sleep(60)", LateNews(Hosts()))


def test_a_process_without_its_parent_ends_before_it_begins(tmp_path: Path) -> None:
    worker = FromParent(
        parent=os.getppid(),  # this one's, not that of the process below
        model_folder=tmp_path,
        workspace=tmp_path,
        end_file=tmp_path / "end",
        is_main=True,
        shown_plan="",
    )
    code = "from dreambooth.job.run import run_job; import os; run_job([], os.environ)"
    environ = {**os.environ, WORKER: worker.as_text()}
    ended = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, b"", b"")
    assert not worker.end_file.exists()


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


def test_a_killed_process_counts_more_than_one_that_cannot_find_it(run: Run) -> None:
    with pytest.raises(ResourceError, match="ended by SIGKILL, and the other with it"):
        run(
            "from dreambooth.job.workers import FromParent, NotJoinedError\n"
            "rank or os.kill(os.getpid(), signal.SIGKILL)\n"
            "time.sleep(0.3); FromParent.read(os.environ).tell(NotJoinedError('Gone.'))\n"
            "sys.exit(1)"
        )
    with pytest.raises(DreamBoothError, match="Gone"):
        run(_fails(NotJoinedError("Gone.")))


def _fails(error: Exception, *, of_rank: int = 1) -> str:
    """Return a program whose one rank tells an error, after the other has lost its connection."""
    lost = repr(RuntimeError("Connection closed by peer"))
    faults = getattr(error, "faults", None)
    told = f"HyperparameterError({faults!r})" if faults else repr(error)
    return (
        f"from dreambooth.job.workers import FromParent, NotJoinedError\n"
        f"from dreambooth.errors import *\n"
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
