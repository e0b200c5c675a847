"""The hosts of a job find each other, are named where they do not, and end together."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dreambooth.errors import UserError
from dreambooth.job import meeting
from dreambooth.job.meeting import Meeting, Start
from dreambooth.job.run import run_job
from dreambooth.process.stop import Stopped
from dreambooth.settings.container import Hosts

FIRST, SECOND = "127.0.0.1", "algo-2"
HOSTS = Hosts(names=(FIRST, SECOND))
OTHER = Hosts(names=(FIRST, SECOND), current=1)


@pytest.fixture(autouse=True)
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    """Return a free port, which the hosts of each test use, and shorten what they wait for."""
    found = meeting._free_port()
    monkeypatch.setattr(meeting, "PORT", found)
    monkeypatch.setattr(meeting, "_LAST_S", 5.0)
    monkeypatch.setattr(meeting, "_TELL_S", 1.0)
    monkeypatch.setattr(meeting, "_POLL_S", 0.01)
    monkeypatch.setattr(meeting, "_RETRY_S", 0.01)
    return found


@contextlib.contextmanager
def beside(host: Callable[[], None]) -> Iterator[None]:
    """Run what another host does, in a thread, during the block, and join it."""
    thread = threading.Thread(target=host)
    thread.start()
    try:
        yield
    finally:
        thread.join(20)
    assert not thread.is_alive()


def test_all_hosts_start_with_the_same_and_the_first_leaves_first() -> None:
    starts: list[Start | None] = []
    left: list[str] = []

    def second() -> None:
        with Meeting(OTHER) as other:
            starts.append(other.wait_for_the_first())
        left.append(SECOND)

    with beside(second), Meeting(HOSTS) as first:
        starts.append(first.begin(4))
        first.wait_for_an_end(5)
        assert first.ends[SECOND].code == 0
        time.sleep(0.1)
        left.append(FIRST)
    assert left == [FIRST, SECOND]
    assert starts[0] == starts[1]
    assert starts[0] is not None
    assert starts[0].on_each_host == 4


def test_a_host_has_nothing_to_do_where_the_first_trains_alone() -> None:
    began: list[Start | None] = []

    def second() -> None:
        with Meeting(OTHER) as other:
            began.append(other.wait_for_the_first())

    with beside(second), Meeting(HOSTS):
        time.sleep(0.2)
        assert not began  # it stays until the first has ended
    assert began == [None]


def test_what_another_host_failed_of_is_said_on_the_first() -> None:
    def second() -> None:
        with contextlib.suppress(UserError), Meeting(OTHER) as other:
            other.wait_for_the_first()
            raise UserError("The disk is full.")

    with beside(second), Meeting(HOSTS) as first:
        first.begin(1)
        first.wait_for_an_end(5)
        with pytest.raises(UserError, match="On host algo-2: The disk is full"):
            first.refuse_failed_hosts()


def test_the_others_end_with_a_first_host_that_fails_before_the_start() -> None:
    refused: list[str] = []

    def second() -> None:
        try:
            with Meeting(OTHER) as other:
                other.wait_for_the_first()
        except UserError as error:
            refused.append(str(error))

    def first() -> None:
        with Meeting(Hosts(names=(FIRST, SECOND, "algo-3"))) as met:
            while not (accepted := met._accepted()):
                time.sleep(0.01)
            met._connections[SECOND] = accepted[0]
            raise UserError("The disk is full.")

    with beside(second), pytest.raises(UserError):
        first()
    assert refused == [f"The host {FIRST} of this job has ended: its log says why."]


def test_a_first_host_that_vanishes_has_not_ended_well(port: int) -> None:
    with socket.create_server(("", port)) as first:

        def vanish() -> None:
            first.accept()[0].close()

        ended = pytest.raises(UserError, match=f"The host {FIRST} of this job has ended")
        with beside(vanish), ended, Meeting(OTHER) as other:
            other.wait_for_the_first()


@pytest.mark.parametrize("fails", [False, True])
def test_a_first_host_that_ends_before_another_has_come_waits_for_it(fails: bool) -> None:
    began: list[Start | str | None] = []

    def second() -> None:
        time.sleep(0.5)
        try:
            with Meeting(OTHER) as other:
                began.append(other.wait_for_the_first())
        except UserError as error:
            began.append(str(error))

    with beside(second), contextlib.suppress(UserError), Meeting(HOSTS):
        if fails:
            raise UserError("The disk is full.")
    ended = f"The host {FIRST} of this job has ended: its log says why."
    assert began == [ended if fails else None]


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (b"", "The host algo-2 of this job has ended: its log says why"),
        (b'{"code": 1, "sentence": "Full."}\n', "On host algo-2: Full"),
        (b'{"code": 143, "sentence": ""}\n', "stopped by SIGTERM"),
    ],
)
def test_a_host_that_ends_before_the_start_ends_the_job(
    end: bytes, expected: str, port: int
) -> None:
    def second() -> None:
        with socket.create_connection((FIRST, port)) as other:
            other.sendall(b'{"host": "algo-2"}\n' + end)

    hosts = Hosts(names=(FIRST, SECOND, "algo-3"))
    ended = pytest.raises((UserError, Stopped), match=expected)
    with ended, Meeting(hosts) as first, beside(second):
        first.begin(1)


def test_a_first_host_that_is_stopped_before_the_start_stops_the_others(port: int) -> None:
    with socket.create_server(("", port)) as first:

        def stop() -> None:
            with first.accept()[0] as connection:
                connection.sendall(b'{"code": 143, "sentence": "stopped by SIGTERM"}\n')

        with beside(stop), pytest.raises(Stopped, match="SIGTERM"), Meeting(OTHER) as other:
            other.wait_for_the_first()


def test_a_host_that_cannot_begin_tells_the_first_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environ = {
        "SM_HOSTS": json.dumps([FIRST, SECOND]),
        "SM_CURRENT_HOST": SECOND,
        "SAGEMAKER_BASE_DIR": str(tmp_path),
    }
    argv = ["--pretrained-model=tiny", f"--train={tmp_path}", f"--model_dir={tmp_path / 'model'}"]

    def second() -> None:
        assert run_job(argv, environ) == 1

    missing = pytest.raises(UserError, match=r"On host algo-2: dataset_info\.json is missing")
    with missing, Meeting(HOSTS) as first, beside(second):
        first.begin(1)
    monkeypatch.setattr(meeting, "_TELL_FIRST_S", 0.5)
    assert run_job(argv, environ) == 1  # nobody listens


def test_a_long_sentence_arrives_whole() -> None:
    def second() -> None:
        with contextlib.suppress(UserError), Meeting(OTHER) as other:
            other.wait_for_the_first()
            raise UserError("\N{CAT}" * 1000)

    with beside(second), Meeting(HOSTS) as first:
        first.begin(1)
        first.wait_for_an_end(5)
        assert first.ends[SECOND].sentence == "\N{CAT}" * 1000


def test_a_stop_of_the_first_host_is_known_to_the_others() -> None:
    codes: list[int] = []

    def second() -> None:
        with Meeting(OTHER) as other:
            other.wait_for_the_first()
            other.wait_for_an_end(5)
            codes.append(other.ends[FIRST].code)

    def stopped() -> None:
        with Meeting(HOSTS) as first:
            first.begin(1)
            raise Stopped(signal.SIGTERM)

    with beside(second), pytest.raises(Stopped):
        stopped()
    assert codes == [143]


@pytest.mark.parametrize(
    ("hosts", "missing"),
    [(HOSTS, "host algo-2"), (OTHER, "host 127.0.0.1")],
    ids=["first", "other"],
)
def test_a_host_that_cannot_be_reached_is_named_and_ends_the_job(
    hosts: Hosts,
    missing: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(meeting, "NOTE_S", 0.5)
    monkeypatch.setattr(meeting, "LONGEST_S", 2.0)

    def meet() -> None:
        with Meeting(hosts) as met:
            met.begin(1)

    with caplog.at_level(logging.WARNING), pytest.raises(UserError, match=missing) as raised:
        meet()
    assert f"beginning with {meeting.PORT} of the first one" in str(raised.value)
    named = [line for line in caplog.messages if f"the {missing} of this job cannot" in line]
    assert len(named) == 3


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b'{"host": "algo-3"}\n{"host": ["algo-2"]}\n[1]\n',
        b"[" * 100_000,
        b"\0" * 100_000,
        b"",
    ],
)
def test_strangers_change_nothing(sent: bytes, port: int) -> None:
    def second() -> None:
        with socket.create_connection((FIRST, port)) as stranger:
            with contextlib.suppress(OSError):
                stranger.sendall(sent)
            with Meeting(OTHER) as other:
                assert other.wait_for_the_first() is not None

    thread = threading.Thread(target=second)
    with Meeting(HOSTS) as first:
        thread.start()
        first.begin(1)
        assert list(first._connections) == [SECOND]
    thread.join(20)
    assert not thread.is_alive()


def test_strangers_without_end_change_nothing(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "_MOST_STRANGERS", 4)
    met = threading.Event()

    def stranger() -> None:
        flooding = socket.create_connection((FIRST, port))
        with flooding, contextlib.suppress(OSError):
            while not met.is_set():
                flooding.sendall(b"\n" * 65_536)

    def second() -> None:
        with contextlib.ExitStack() as idle:
            many = [idle.enter_context(socket.create_connection((FIRST, port))) for _ in range(9)]
            assert many[0].recv(1) == b""  # closed, to make room
            with Meeting(OTHER) as other:
                assert other.wait_for_the_first() is not None

    with Meeting(HOSTS) as first, beside(stranger), beside(second):
        first.begin(1)
        met.set()


def test_a_job_of_one_host_opens_no_port() -> None:
    with Meeting(Hosts()) as alone:
        assert alone.begin(2).on_each_host == 2
        assert alone._listener is None


def test_a_port_in_use_is_one_sentence(port: int) -> None:
    with socket.create_server(("", port)), pytest.raises(UserError, match=f"port {port}"):
        Meeting(HOSTS).__enter__()
