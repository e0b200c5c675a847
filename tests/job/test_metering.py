"""The meter reads a job in training, and changes nothing in it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from safetensors.torch import save_file

from dreambooth.errors import ResourceError
from dreambooth.job.kept_states import KeptStates
from dreambooth.job.run import run_job
from dreambooth.training import meter
from dreambooth.training.meter import Meter, MeterReading

Start = Callable[..., int]


@pytest.fixture
def start(small_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Return a function that runs a job on three pictures; `name` is the model folder's."""
    monkeypatch.setattr(meter, "SHARE", 3.0)  # six steps are too few for a tenth
    generator = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for number in range(3):
        pixels = generator.integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / f"{number}.png")
    info = {"instance_prompt": "a photo of riobugger cat", "class_prompt": "a photo of cat"}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))

    def run(name: str, *options: str) -> int:
        argv = [f"--pretrained-model={small_model_folder}", f"--train={tmp_path / 'data'}"]
        argv += [f"--model_dir={tmp_path / name}", "--learning_rate=0.001", "--max_steps=6"]
        return run_job([*argv, *options], {"SAGEMAKER_BASE_DIR": str(tmp_path / "none")})

    return run


def readings(model_dir: Path) -> dict[int, dict[str, float]]:
    lines = (model_dir.with_name(f"{model_dir.name}-output") / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in lines.splitlines()]
    return {row["step"]: row["meter"] for row in rows if "meter" in row}


def weights_of(folder: Path, part: str = "unet") -> dict[str, np.ndarray[Any, Any]]:
    (path,) = (folder / part).glob("*.safetensors")
    return load_file(path)


@pytest.mark.parametrize(
    "options",
    [
        ["--with_prior_preservation", "--prior_preservation_mode=prediction"],
        ["--train_text_encoder", "--mixed_precision=fp16"],
        ["--memory_plan=8bit_adamw_in_backward", "--mixed_precision=bf16"],
        ["--fast_step", "--mixed_precision=bf16", "--memory_plan=8bit_adamw"],
    ],
    ids=["prediction", "text encoder, fp16", "freed gradients", "fast step"],
)
def test_the_weights_are_the_same_to_the_bit_without_it(
    start: Start, tmp_path: Path, options: list[str]
) -> None:
    assert start("with", *options) == 0
    assert start("without", "--meter=False", *options) == 0
    assert readings(tmp_path / "with")
    assert readings(tmp_path / "without") == {}
    parts = ["unet", *["text_encoder"] * ("--train_text_encoder" in options)]
    for part in parts:
        mine, others = (weights_of(tmp_path / name, part) for name in ("with", "without"))
        assert mine.keys() == others.keys()
        assert all(np.array_equal(mine[name], others[name]) for name in mine)


def test_it_reads_the_last_step_and_says_what_it_cost(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("mine") == 0
    shown = capsys.readouterr().err
    found = readings(tmp_path / "mine")
    assert max(found) == 6
    assert {"loss", "loss_1", "loss_4", "drift_class", "drift_other_class", "drift_empty"} <= set(
        found[6]
    )
    assert "loss at fixed noise" in shown
    assert "% of training; at the end the loss on the instance pictures fell most at" in shown
    report = (tmp_path / "mine-output" / "report.html").read_text()
    assert "Loss at fixed noise" in report
    assert "What guidance multiplies" in report


def test_a_resumed_job_reads_what_the_unbroken_one_reads(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meter, "reading_interval", lambda plan, settings: 1)
    assert start("whole") == 0
    kept = f"--checkpoint_dir={tmp_path / 'kept'}"
    assert start("broken", "--max_steps=4", "--keep_last_checkpoint", kept) == 0
    (tmp_path / "broken-output" / "metrics.jsonl").unlink()  # as on another Spot machine
    assert start("broken", kept) == 0
    whole, broken = readings(tmp_path / "whole"), readings(tmp_path / "broken")
    assert [*whole] == [1, 2, 3, 4, 5, 6]
    assert broken == {step: whole[step] for step in (5, 6)}
    assert "convergence" in whole[6]


def test_a_meter_that_fails_ends_with_one_warning(
    start: Start,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(Meter, "read", fail)
    assert start("mine") == 0
    assert capsys.readouterr().err.count("the meter stops: RuntimeError: no") == 1
    assert readings(tmp_path / "mine") == {}
    monkeypatch.setattr(Meter, "start", fail)
    assert start("other") == 0
    assert capsys.readouterr().err.count("there is no meter: RuntimeError: no") == 1


def test_a_short_run_has_no_meter(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meter, "SHARE", 0.1)
    assert start("mine") == 0
    assert readings(tmp_path / "mine") == {}


@pytest.fixture
def burning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read the meter at each step, and have guidance multiply too much from step 4 on."""
    monkeypatch.setattr(meter, "reading_interval", lambda plan, settings: 1)
    read = Meter.read

    def burnt(self: Meter, step: int, earlier: Sequence[MeterReading]) -> MeterReading:
        return replace(read(self, step, earlier), guidance=1.0 if step < 4 else 3.0)

    monkeypatch.setattr(Meter, "read", burnt)


@pytest.mark.usefixtures("burning")
def test_early_stopping_ends_the_run_and_writes_the_model_of_the_last_good_reading(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("three", "--max_steps=3") == 0
    assert start("mine", "--early_stopping", "--sample_steps=6") == 0
    shown = capsys.readouterr().err
    assert "stopped at step 5 of 6: what guidance multiplies is 3.00 times" in shown
    output = tmp_path / "mine-output"
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 5
    mine, three = weights_of(tmp_path / "mine"), weights_of(tmp_path / "three")
    for name, value in three.items():  # kept in fp16
        assert np.array_equal(mine[name], value.astype(np.float16).astype(np.float32)), name
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "- Steps: 3. Stopped at step 5 of 6: " in card
    assert "Partial" not in card
    report = (output / "report.html").read_text()
    assert "Stopped at step 5 of 6" in report
    assert "the model of step 3" in report
    assert ">kept</text>" in report
    assert not (output / "states").exists()
    assert [path.name for path in (output / "samples").iterdir()] == ["step-000003.png"]


@pytest.mark.usefixtures("burning")
def test_without_early_stopping_the_log_says_what_it_would_have_done(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("mine") == 0
    assert "early_stopping would have stopped at step 5 of 6" in capsys.readouterr().err
    assert "Steps: 6\n" in (tmp_path / "mine" / "README.md").read_text()


def charts_of(report: str) -> list[str]:
    return re.findall(r"<svg class=.chart.*?</svg>", report, re.DOTALL)


@pytest.mark.usefixtures("burning")
def test_a_resumed_run_ends_where_the_unbroken_one_does(start: Start, tmp_path: Path) -> None:
    options = ["--early_stopping", "--keep_last_checkpoint", "--keep_states=1"]
    assert start("whole", *options) == 0
    states = tmp_path / "whole-output" / "checkpoints" / "states"
    assert [path.name for path in states.iterdir()] == ["step-00000003"]
    kept = f"--checkpoint_dir={tmp_path / 'kept'}"
    assert start("broken", *options, "--max_steps=4", kept) == 0
    assert start("broken", *options, kept) == 0
    report = tmp_path / "broken-output" / "report.html"
    first = report.read_text()
    assert "Stopped at step 5 of 6" in first
    again = start("broken", *options, kept)  # what has ended early ends at once
    assert again == 0
    assert charts_of(report.read_text()) == charts_of(first)  # the stop is marked where it was
    whole, broken = weights_of(tmp_path / "whole"), weights_of(tmp_path / "broken")
    assert all(np.array_equal(broken[name], whole[name]) for name in whole)


@pytest.mark.usefixtures("burning")
def test_a_state_that_is_gone_is_named_and_the_last_weights_are_taken(
    start: Start,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> None:
        raise ResourceError("A state cannot be written: the disk is full.")

    monkeypatch.setattr(KeptStates, "save", full)
    assert start("mine", "--early_stopping") == 0
    shown = capsys.readouterr().err
    assert "A state cannot be written: the disk is full." in shown
    assert "step 3, which is gone: the last weights are taken instead" in shown
    assert "- Steps: 5. Stopped" in (tmp_path / "mine" / "README.md").read_text()


def test_a_full_disk_costs_no_earlier_state(
    start: Start,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(meter, "reading_interval", lambda plan, settings: 1)

    def fill_up(tensors: dict[str, Any], path: Path, **keywords: Any) -> None:
        if "step-00000002" in str(path):
            raise OSError(28, "No space left on device")
        save_file(tensors, path, **keywords)

    monkeypatch.setattr("dreambooth.job.kept_states.save_file", fill_up)
    options = ("--early_stopping", "--keep_states=1", "--keep_last_checkpoint", "--max_steps=2")
    assert start("mine", *options) == 0
    assert "A state cannot be written" in capsys.readouterr().err
    kept = tmp_path / "mine-output" / "checkpoints" / "states"
    assert [path.name for path in kept.iterdir()] == ["step-00000001"]


def test_early_stopping_needs_a_meter(
    start: Start, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert start("mine", "--early_stopping", "--meter=False") == 1
    assert "early_stopping needs meter=True." in capsys.readouterr().err
    assert start("mine", "--keep_states=3", "--meter=False") == 1
    assert "keep_states above 2 needs meter=True." in capsys.readouterr().err
    monkeypatch.setattr(meter, "SHARE", 0.1)
    assert start("mine", "--early_stopping", "--keep_states=3") == 0
    assert "keep_states: a run of 6 steps is too short for it" in capsys.readouterr().err
    assert start("mine", "--early_stopping") == 0
    assert "early_stopping: a run of 6 steps is too short for it" in capsys.readouterr().err
