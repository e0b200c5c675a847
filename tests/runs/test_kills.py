"""kill -9 of trainer, runner and both, at random moments: what is shown stays true."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dreambooth.runs import run_list
from dreambooth.runs.record import Record
from dreambooth.runs.run_folder import RunState
from dreambooth.runs.run_list import RunList
from dreambooth.runs.stop_run import stop
from tests.runs.processes import (
    PHASES,
    TRUE_WITHIN_S,
    is_true,
    kill,
    runners,
    settings,
    trainers,
    wait_until,
    with_stand_ins,
)

KILLED = ("trainer", "runner", "both")
ON_DEMAND = pytest.mark.on_demand


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    kill(runners(tmp_path))
    kill(trainers(tmp_path))


def moments(count: int) -> list[tuple[str, int]]:
    return [(killed, number) for killed in KILLED for number in range(count)]


def at_a_random_moment(runs: RunList, killed: str, seed: int) -> None:
    """Begin the first run of a list, and kill -9 what is named in one of its phases."""
    draws = random.Random(f"{killed} {seed}")
    phase, delay = draws.choice(list(PHASES)), draws.uniform(0, 0.3)
    first = runs.runs()[0]
    runs.start()
    wait_until(lambda: PHASES[phase](first) or first.exit_code() is not None)
    time.sleep(delay)
    if killed != "trainer":
        kill(runners(runs.folder))
    if killed != "runner":
        kill(trainers(first.folder))
    wait_until(
        lambda: (
            runs.has_runner() == bool(runners(runs.folder))
            and all(is_true(run) for run in runs.runs())
        ),
        TRUE_WITHIN_S,
    )


@pytest.mark.parametrize(
    ("killed", "seed"),
    [*moments(1), *(pytest.param(*one, marks=ON_DEMAND) for one in moments(26) if one[1])],
)
def test_after_a_kill_the_list_goes_on_to_its_end(
    place: Path, killed: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_stand_ins(monkeypatch)
    runs = RunList(place)
    first, second = runs.new(settings()), runs.new(settings(4))
    at_a_random_moment(runs, killed, seed)
    runs.start()
    most = 0

    def is_over() -> bool:
        nonlocal most
        most = max(most, len(trainers(place)))
        return not runs.has_runner() and second.state() == RunState.DONE

    wait_until(is_over)
    if first.state() != RunState.DONE:
        assert first.state() == RunState.DIED
        run_list.go_on(first, {})
        assert first.state() == RunState.WAITING
        runs.start()
        wait_until(is_over)
        assert first.state() == RunState.DONE
    rows = (first.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(1, 21))
    assert most <= 1


@pytest.mark.parametrize(
    ("killed", "seed"),
    [*moments(1), *(pytest.param(*one, marks=ON_DEMAND) for one in moments(25) if one[1])],
)
def test_what_is_shown_of_a_real_trainer_is_true(place: Path, killed: str, seed: int) -> None:
    runs = RunList(place)
    first = runs.new(settings(3))
    at_a_random_moment(runs, killed, seed + 100)
    stop(first)
    wait_until(lambda: is_true(first), TRUE_WITHIN_S)
    assert first.state() in (RunState.DONE, RunState.DIED, RunState.STOPPED)
    assert trainers(place) == []


def test_a_run_that_was_started_by_hand_comes_first(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_stand_ins(monkeypatch)
    runs = RunList(place)
    by_hand = Record(place / "by-hand", {})
    by_hand.begin()
    waiting = runs.new(settings(1))
    runs.start()
    time.sleep(0.5)
    assert [run.state() for run in runs.runs()] == [RunState.WAITING, RunState.RUNNING]
    by_hand.ended(0)
    by_hand.close()
    wait_until(lambda: waiting.state() == RunState.DONE)


def test_a_trainer_that_cannot_even_begin_does_not_keep_the_list_waiting(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "broken").mkdir()
    (place / "broken" / "sitecustomize.py").write_text(
        "import os, sys\nif 'train' in sys.orig_argv: print('no such library'); os._exit(1)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(place / "broken"))
    runs = RunList(place / "runs")
    both = [runs.new(settings(1)), runs.new(settings(1))]
    runs.start()
    wait_until(lambda: not runs.has_runner())
    assert [run.state() for run in both] == [RunState.DIED, RunState.DIED]


def test_a_run_whose_log_is_a_pipe_does_not_keep_the_list_waiting(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_stand_ins(monkeypatch)
    runs = RunList(place)
    first, second = runs.new(settings(1)), runs.new(settings(1))
    os.mkfifo(first.folder / "log.txt")
    runs.start()
    wait_until(lambda: not runs.has_runner(), 60)
    assert [run.state() for run in (first, second)] == [RunState.WAITING, RunState.DONE]
