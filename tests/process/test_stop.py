from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dreambooth.process.stop import STOP_SECONDS, Stopped, StopSignals, answered

ROOT = Path(__file__).parents[2]


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def held(stop: StopSignals, work: Callable[[], object]) -> None:
    with stop.listening(), stop.held():
        work()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_a_signal_raises_where_the_job_is(number: signal.Signals, code: int) -> None:
    def work() -> None:
        with StopSignals().listening():
            send(number)
            pytest.fail("the signal was not seen")

    with pytest.raises(Stopped) as caught:
        work()
    assert caught.value.exit_code == code
    assert str(caught.value) == f"stopped by {number.name}"


def test_a_held_signal_waits_for_the_end_of_the_block() -> None:
    stop, done = StopSignals(), []

    def work() -> None:
        send(signal.SIGTERM)
        done.append(stop.asked)

    with pytest.raises(Stopped):
        held(stop, work)
    assert done == [True]


@pytest.mark.parametrize("broken_off", ["by a check", "before a released part", "inside it"])
def test_a_check_or_a_released_part_ends_a_held_block_before(broken_off: str) -> None:
    stop = StopSignals()

    def work() -> None:
        if broken_off != "inside it":
            send(signal.SIGTERM)
        if broken_off == "by a check":
            stop.check()
        with stop.released():
            send(signal.SIGTERM)
        pytest.fail("went on")

    with pytest.raises(Stopped):
        held(stop, work)


def test_after_a_released_part_signals_wait_again() -> None:
    stop, done = StopSignals(), []

    def work() -> None:
        with stop.released():
            pass
        send(signal.SIGTERM)
        done.append(1)

    with pytest.raises(Stopped):
        held(stop, work)
    assert done


def test_an_error_of_the_block_is_not_hidden_by_a_signal() -> None:
    def work() -> None:
        send(signal.SIGTERM)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        held(StopSignals(), work)


def test_a_second_signal_leaves_with_its_own_code() -> None:
    left: list[int] = []

    def work() -> None:
        send(signal.SIGTERM)
        send(signal.SIGINT)

    with pytest.raises(Stopped):
        held(StopSignals(leave=left.append), work)
    assert left == [130]


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGHUP])
def test_a_terminal_that_closes_may_say_so_twice(first: signal.Signals) -> None:
    left: list[int] = []

    def work() -> None:
        for number in (first, signal.SIGHUP, signal.SIGHUP):
            send(number)
            time.sleep(0.05)  # for the thread that counts them

    with pytest.raises(Stopped):
        held(StopSignals(leave=left.append), work)
    assert left == []


def test_a_second_signal_ends_a_real_process_at_once() -> None:
    code = (
        "import time; from dreambooth.process.stop import StopSignals\n"
        "stop = StopSignals()\n"
        "with stop.listening(), stop.held():\n"
        "    print('ready', flush=True)\n"
        "    while not stop.asked: time.sleep(0.01)\n"
        "    print('asked', flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None
    with process, process.stdout:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == b"asked\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 143


def test_two_signals_during_one_long_call_end_a_real_process_at_once() -> None:
    code = (
        "import hashlib; from dreambooth.process.stop import StopSignals\n"
        "stop = StopSignals()\n"
        "with stop.listening(), stop.held():\n"
        "    print('ready', flush=True)\n"
        "    hashlib.pbkdf2_hmac('sha256', b'a', b'b', 10**9)\n"  # runs for minutes in C
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None
    with process, process.stdout:
        assert process.stdout.readline() == b"ready\n"
        for _ in range(2):
            time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 143


def test_the_time_left_runs_from_the_signal() -> None:
    now, left = [1000.0], []
    stop = StopSignals(clock=lambda: now[0])
    assert stop.seconds_left() == STOP_SECONDS

    def work() -> None:
        send(signal.SIGTERM)
        now[0] += 30
        left.append(stop.seconds_left())

    with pytest.raises(Stopped):
        held(stop, work)
    assert left == [STOP_SECONDS - 30]


@pytest.mark.parametrize("ignored", [signal.SIGINT, signal.SIGHUP])
def test_the_callers_handlers_come_back_and_an_ignored_signal_stays_so(
    ignored: signal.Signals,
) -> None:
    before = signal.signal(ignored, signal.SIG_IGN)
    try:
        with StopSignals().listening():
            assert signal.getsignal(ignored) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert ignored not in answered()
        assert ignored in answered(always=(ignored,))
    finally:
        signal.signal(ignored, before)


def test_outside_of_the_main_thread_nothing_is_changed() -> None:
    entered = []

    def work() -> None:
        with StopSignals().listening():
            entered.append(time.monotonic())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert entered
