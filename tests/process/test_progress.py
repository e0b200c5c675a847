from __future__ import annotations

import io
import re

import pytest

from dreambooth.process.progress import Progress


class Clock:
    """A clock that shows the same time until it is set."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class AsciiTerminal(Terminal):
    encoding = "ascii"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")


def untimed(stream: io.StringIO) -> list[str]:
    """Return the printed lines without the time of day at their start."""
    lines = stream.getvalue().splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d \S", line) for line in lines)
    return [line[9:] for line in lines]


def test_a_log_gets_a_line_at_the_start_every_interval_and_at_the_end(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress(40, "training", stream=stream, clock=clock, interval_s=5.0) as progress:
        for step in range(1, 41):
            clock.now += 0.5
            progress.update(step, loss=0.0123, learning_rate="2.0e-06")

    assert untimed(stream) == [
        "training: 0/40",
        "training: 10/40  loss 0.0123  learning_rate 2.0e-06  2 steps/s  0:15 left",
        "training: 20/40  loss 0.0123  learning_rate 2.0e-06  2 steps/s  0:10 left",
        "training: 30/40  loss 0.0123  learning_rate 2.0e-06  2 steps/s  0:05 left",
        "training: 40/40  loss 0.0123  learning_rate 2.0e-06  2 steps/s  0:00 left",
        "training: 40/40  loss 0.0123  learning_rate 2.0e-06  2 steps/s  in 0:20",
    ]


def test_a_terminal_gets_one_line_that_is_redrawn(clock: Clock) -> None:
    stream = Terminal()
    with Progress(4, "class images", stream=stream, clock=clock, unit="pictures") as progress:
        for done in range(1, 5):
            clock.now += 2.0
            progress.update(done)

    text = stream.getvalue()
    assert text.count("\n") == 1
    assert text.endswith("\n")
    first, *_, last = text.rstrip("\n").split("\r")[1:]
    assert first.startswith("class images |····")
    assert "|" + "█" * 24 + "| 4/4  0.5 pictures/s  in 0:08" in last
    assert "0:04 left" in text


def test_a_terminal_is_not_redrawn_for_every_step(clock: Clock) -> None:
    stream = Terminal()
    with Progress(1000, "training", stream=stream, clock=clock) as progress:
        for step in range(1000):
            clock.now += 0.001
            progress.update(step)
    assert stream.getvalue().count("\r") < 15


def test_a_shorter_line_wipes_the_longer_one(clock: Clock) -> None:
    stream = Terminal()
    progress = Progress(4, "t", stream=stream, clock=clock)
    clock.now += 1
    progress.update(1, note="a long note indeed")
    clock.now += 1
    progress.update(2)
    long, short = stream.getvalue().split("\r")[-2:]
    assert len(short) >= len(long.rstrip())
    assert short.endswith(" ")


def test_lines_never_pass_the_terminals_width(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    stream = Terminal()
    with Progress(4, "training", stream=stream, clock=clock) as progress:
        clock.now += 1
        progress.update(1, loss=0.5, learning_rate="2e-06")
    assert max(len(line) for line in stream.getvalue().rstrip("\n").split("\r")) < 20


def test_a_terminal_without_unicode_gets_plain_cells(clock: Clock) -> None:
    stream = AsciiTerminal()
    with Progress(2, "t", stream=stream, clock=clock) as progress:
        progress.update(2)
    assert stream.getvalue().isascii()
    assert "|####" in stream.getvalue()


def test_the_speed_is_that_of_the_recent_past(clock: Clock) -> None:
    stream = io.StringIO()
    progress = Progress(1000, "training", stream=stream, clock=clock, interval_s=1.0)
    clock.now += 100.0  # the first step includes compilation
    progress.update(1)
    for step in range(2, 102):
        clock.now += 1.0
        progress.update(step)
    assert "  1 steps/s  14:59 left" in stream.getvalue().splitlines()[-1]
    progress.close()
    assert "101/1000  0.505 steps/s  in 3:20" in stream.getvalue().splitlines()[-1]


def test_steps_done_before_this_run_do_not_count_for_the_speed(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress(100, "t", stream=stream, clock=clock, initial=90) as progress:
        clock.now += 10.0
        progress.update(95)
    assert untimed(stream)[0] == "t: 90/100"
    assert untimed(stream)[1] == "t: 95/100  0.5 steps/s  0:10 left"


def test_long_times_show_hours(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress(100_000, "t", stream=stream, clock=clock) as progress:
        clock.now += 10.0
        progress.update(10)
    assert "27:46:30 left" in stream.getvalue()


@pytest.mark.parametrize("total", [0, 5])
@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_nothing_to_do_and_no_time_to_do_it(
    clock: Clock, total: int, kind: type[io.StringIO]
) -> None:
    with Progress(total, "t", stream=kind(), clock=clock) as progress:
        progress.update(total)
        progress.update(total + 3)
        progress.update(0, loss=float("nan"))


def test_closing_twice_ends_one_line(clock: Clock) -> None:
    stream = Terminal()
    progress = Progress(1, "t", stream=stream, clock=clock)
    progress.close()
    progress.close()
    assert stream.getvalue().count("\n") == 1
