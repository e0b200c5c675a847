from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dreambooth.training.loop import StepMetrics
from dreambooth.training.run_log import RunLog, plain_decimal

Make = Callable[..., Any]


def metrics(step: int, plan: Any, loss: float = 0.5) -> StepMetrics:
    return StepMetrics(
        step=step,
        epoch=plan.epoch(step),
        loss=loss,
        instance_loss=loss,
        class_loss=None,
        learning_rate=2e-6,
        grad_norm=1.0,
    )


def run(folder: Path, plan: Any, steps: range, **changes: Any) -> str:
    stream = io.StringIO()
    with RunLog(folder, plan, first_step=steps.start - 1, stream=stream, **changes) as report:
        for step in steps:
            report.step(metrics(step, plan, loss=1e-5 * step))
    report.finish(4e-5)
    return stream.getvalue()


def test_metrics_have_every_documented_field(make_training: Make, tmp_path: Path) -> None:
    plan = make_training(max_steps=2).plan
    run(tmp_path, plan, range(1, 3))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert list(rows[0]) == [
        *("step", "epoch", "loss", "instance_loss", "class_loss", "learning_rate"),
        *("grad_norm", "steps_per_second", "time"),
    ]
    assert rows[0]["class_loss"] is None


def test_a_line_per_epoch_and_at_the_end_in_plain_decimals(
    make_training: Make,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.INFO)
    plan = make_training(max_steps=7).plan  # with 3 pictures, epochs end at steps 3 and 6
    shown = run(tmp_path, plan, range(1, 8))
    printed = capsys.readouterr()
    assert "train_avg_loss" not in shown + printed.err + caplog.text  # only once, on stdout
    assert printed.out.splitlines() == [
        "End epoch 1: train_avg_loss=0.00002000",
        "End epoch 2: train_avg_loss=0.00005000",
        "End of training: train_avg_loss=0.00004000",
    ]


def test_plain_decimals_have_no_exponent() -> None:
    assert plain_decimal(1.2e-5) == "0.00001200"
    assert plain_decimal(123.5) == "123.50000000"


def test_progress_shows_loss_learning_rate_and_speed(make_training: Make, tmp_path: Path) -> None:
    shown = run(tmp_path, make_training(max_steps=3).plan, range(1, 4))
    assert "3/3" in shown
    assert "loss" in shown
    assert "2.00e-06" in shown
    assert "steps/s" in shown


def test_samples_are_drawn_when_due(make_training: Make, tmp_path: Path) -> None:
    plan = make_training(max_steps=5).plan
    picture = Image.new("RGB", (8, 8), "red")
    run(tmp_path, plan, range(1, 6), sample_steps=2, draw_sample=lambda: picture)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "step-000002.png",
        "step-000004.png",
    ]


def test_the_last_steps_sample_is_given_once_the_model_is_written(
    make_training: Make, tmp_path: Path
) -> None:
    plan = make_training(max_steps=4).plan
    drawn = []

    def draw() -> Image.Image:
        drawn.append(1)
        return Image.new("RGB", (8, 8), "red")

    for every, names in ((2, ["step-000002.png", "step-000004.png"]), (3, ["step-000003.png"])):
        folder = tmp_path / str(every)
        drawn.clear()
        settings = {"first_step": 0, "stream": io.StringIO()}
        with RunLog(folder, plan, sample_steps=every, draw_sample=draw, **settings) as report:
            for step in range(1, 5):
                report.step(metrics(step, plan))
        assert len(drawn) == 1
        report.add_last_sample(Image.new("RGB", (8, 8), "blue"), step=plan.steps)
        assert sorted(path.name for path in (folder / "samples").iterdir()) == names


def test_a_sample_that_could_not_be_drawn_is_left_out(make_training: Make, tmp_path: Path) -> None:
    plan = make_training(max_steps=2).plan
    run(tmp_path, plan, range(1, 3), sample_steps=2, draw_sample=lambda: None)
    assert not (tmp_path / "samples").exists()


def test_a_resumed_run_continues_the_metrics_where_its_checkpoint_stood(
    make_training: Make, tmp_path: Path
) -> None:
    plan = make_training(max_steps=6).plan
    run(tmp_path, plan, range(1, 6))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # the process was killed while writing
    run(tmp_path, plan, range(4, 7))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]


def test_a_fresh_run_clears_what_an_earlier_one_left(make_training: Make, tmp_path: Path) -> None:
    plan = make_training(max_steps=4).plan
    picture = Image.new("RGB", (8, 8))
    run(tmp_path, plan, range(1, 5), sample_steps=2, draw_sample=lambda: picture)
    (tmp_path / "samples" / "mine.png").write_bytes(b"")
    (tmp_path / "meter").mkdir()
    for name in ("step-000000-subject.png", "scores.json", "mine.png"):
        (tmp_path / "meter" / name).write_bytes(b"")
    run(tmp_path, plan, range(4, 5))  # a resumed run clears nothing
    assert len(list((tmp_path / "meter").iterdir())) == 3
    run(tmp_path, plan, range(1, 3))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["mine.png"]
    assert [path.name for path in (tmp_path / "meter").iterdir()] == ["mine.png"]


def test_tensorboard_events_hold_the_curves(make_training: Make, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plan = make_training(max_steps=6).plan
    run(tmp_path, plan, range(1, 6))
    time.sleep(1.1)  # tensorboard orders its files by the seconds in their names
    run(tmp_path, plan, range(4, 7))  # resumes from step 3
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {
        *("loss", "instance_loss", "learning_rate", "grad_norm"),
    }
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert events.Scalars("learning_rate")[0].value == pytest.approx(2e-6)


def test_steps_that_are_read_at_once_share_their_time(make_training: Make, tmp_path: Path) -> None:
    plan = make_training(max_steps=5).plan
    clock = iter([-9.0, 0.0, 1.0, 1.0, 5.0]).__next__
    began = time.time()
    with RunLog(tmp_path, plan, first_step=0, stream=io.StringIO(), clock=clock) as report:
        report.step(metrics(1, plan))
        for step in range(2, 6):
            report.step(replace(metrics(step, plan), read_with=4))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["steps_per_second"] for row in rows] == [1.0] * 5
    ends = [row["time"] - began for row in rows[1:]]  # when steps were made, not read
    assert ends == pytest.approx([-3, -2, -1, 0], abs=0.5)
    assert "read_with" not in rows[0]
