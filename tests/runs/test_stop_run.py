"""A stop always ends the run, says what is left, and reaches nobody else."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dreambooth.errors import UserError
from dreambooth.process.identity import ProcessIdentity
from dreambooth.runs import stop_run
from dreambooth.runs.record import Record, mark_begun
from dreambooth.runs.run_folder import Run, RunState
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


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunList]:
    with_stand_ins(monkeypatch)
    yield RunList(tmp_path)
    kill(runners(tmp_path))
    kill(trainers(tmp_path))


def test_a_trainer_that_dies_before_it_has_begun_leaves_no_run_that_waits(runs: RunList) -> None:
    run = runs.new(settings(1))
    lock = run.take()
    assert lock is not None
    threading.Timer(0.5, os.close, [lock]).start()
    assert run.state() == RunState.RUNNING
    assert stop(run).state == run.state() == RunState.STOPPED


def test_stop_in_every_phase(runs: RunList) -> None:
    for phase in PHASES:
        run = runs.new(settings(12))
        if phase != "added":
            runs.start()
        wait_until(lambda phase=phase, run=run: PHASES[phase](run))
        result = stop(run)
        wait_until(lambda run=run: is_true(run), TRUE_WITHIN_S)
        assert result.state == run.state()
        if phase in ("added", "taken", "begun", "planned", "trained"):
            assert result.state == RunState.STOPPED
        if phase == "trained":
            assert result.checkpoint_step is not None
            assert "a checkpoint of step" in result.sentence
        if phase == "ended":
            assert result.state == RunState.DONE
            assert result.has_model
        assert not result.was_killed
    assert stop(run).state == RunState.DONE  # what has ended stays as it is


def test_what_does_not_end_in_time_is_killed_and_still_was_stopped(runs: RunList) -> None:
    run = runs.new(settings(1000))
    runs.start()
    wait_until(run.last_metrics)
    (trainer,) = trainers(run.folder)
    os.kill(trainer, signal.SIGSTOP)  # it answers no signal any more
    result = stop(run, grace_s=0.2)
    assert result.was_killed
    assert run.state() == RunState.STOPPED
    assert run.exit_code() == 137
    assert result.sentence == (
        "The run is stopped. It did not end in time and was killed. It has neither a checkpoint "
        "nor a model."
    )


def test_two_stops_at_once_send_one_signal(runs: RunList) -> None:
    run = runs.new(settings(1000))
    runs.start()
    wait_until(run.last_metrics)
    stops = [threading.Thread(target=stop, args=[run]) for _ in range(2)]
    for one in stops:
        one.start()
    for one in stops:
        one.join()
    assert run.state() == RunState.STOPPED
    assert run.checkpoint_step() is not None  # a second signal would have cost it


def test_a_second_signal_of_a_user_is_a_stop_too(runs: RunList) -> None:
    run = runs.new(settings(1000))
    runs.start()
    wait_until(run.last_metrics)
    (trainer,) = trainers(run.folder)
    os.kill(trainer, signal.SIGSTOP)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCONT):
        os.kill(trainer, number)
    wait_until(lambda: not run.is_running)
    assert run.state() == RunState.STOPPED
    assert run.exit_code() in (143, 130)


def test_a_stranger_who_has_the_id_now_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stop_run, "_UNKNOWN_S", 0.1)
    run = Run(tmp_path)
    with subprocess.Popen(["sleep", "60"]) as stranger:
        record = Record(tmp_path, {})
        record.begin()
        mark_begun(run, stranger.pid)
        text = (tmp_path / "process.json").read_text()
        start_time = ProcessIdentity.of(stranger.pid).start_time
        (tmp_path / "process.json").write_text(text.replace(start_time, "1"))
        with pytest.raises(UserError, match="stop it on its own machine or in its container"):
            stop(run, grace_s=0.0)
        record.close()
        assert stop(run).state == RunState.DIED
        assert stranger.poll() is None
        stranger.kill()
