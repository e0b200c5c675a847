"""The meter's pictures: drawn at moments of a run, scored at its end, and in nobody's way."""

from __future__ import annotations

import io
import json
import re
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from dreambooth.data.seeds import derive_seed
from dreambooth.diffusion import model as models
from dreambooth.diffusion import sampling
from dreambooth.diffusion.sampling_request import SamplingRequest
from dreambooth.job import scoring
from dreambooth.job.previews import Previews
from dreambooth.job.run import run_job
from dreambooth.process.stop import Stopped
from dreambooth.training.meter import Meter, MeterReading

Start = Callable[..., int]
NAMES = ("class", "other_class", "place", "subject")


@pytest.fixture
def start(small_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Return a function that runs a job of six steps with room for three moments.

    The meter is read at each step, and from step 4 on guidance multiplies too much.
    """
    monkeypatch.setattr("dreambooth.training.plan.SCORED_STEPS", 2)
    monkeypatch.setattr("dreambooth.training.meter_budget.PICTURE_ROWS", 0.1)
    monkeypatch.setattr("dreambooth.training.meter_budget.moments", lambda *_, **__: 3)
    monkeypatch.setattr("dreambooth.training.meter.reading_interval", lambda *_: 1)
    read = Meter.read

    def burnt(self: Meter, step: int, earlier: Sequence[MeterReading]) -> MeterReading:
        guidance = 1.0 if step < 4 else 3.0
        return replace(
            read(self, step, earlier), loss=1 / (step + 1), convergence=None, guidance=guidance
        )

    monkeypatch.setattr(Meter, "read", burnt)
    generator = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for number in range(2):
        pixels = generator.integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / f"{number}.png")
    info = {"instance_prompt": "a photo of riobugger cat", "class_prompt": "a photo of cat"}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))

    def run(name: str, *options: str) -> int:
        argv = [f"--pretrained-model={small_model_folder}", f"--train={tmp_path / 'data'}"]
        argv += [f"--model_dir={tmp_path / name}", "--learning_rate=0.001", "--max_steps=6"]
        return run_job([*argv, *options], {"SAGEMAKER_BASE_DIR": str(tmp_path / "none")})

    return run


def pictures(model_dir: Path) -> dict[str, bytes]:
    folder = model_dir.with_name(f"{model_dir.name}-output") / "meter"
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def names(*steps: int) -> set[str]:
    return {f"step-{step:06d}-{name}.png" for step in steps for name in NAMES}


def weights_of(folder: Path, part: str = "unet") -> dict[str, np.ndarray[Any, Any]]:
    (path,) = (folder / part).glob("*.safetensors")
    return load_file(path)


@pytest.mark.parametrize(
    "options",
    [
        [
            *("--train_text_encoder", "--with_prior_preservation"),
            "--prior_preservation_mode=prediction",
        ],
        ["--memory_plan=8bit_adamw_in_backward"],
        ["--fast_step", "--mixed_precision=bf16", "--memory_plan=8bit_adamw"],
    ],
    ids=["text encoder, prediction", "freed gradients", "fast step"],
)
def test_the_weights_are_the_same_to_the_bit_without_them(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    # Everything of the fast step but the capture works on a CPU, too.
    monkeypatch.setattr("dreambooth.training.memory_plan.fast_step_obstacle", lambda *_, **__: None)
    monkeypatch.setattr("dreambooth.fast.captured_loop.READ_EVERY", 2)
    monkeypatch.setattr(scoring, "scores_over_steps", lambda *_: {})  # training is over by then
    assert start("with", *options) == 0
    assert pictures(tmp_path / "with").keys() == names(0, 4, 6)
    monkeypatch.setattr("dreambooth.training.meter_budget.moments", lambda *_, **__: 0)
    assert start("without", *options) == 0
    assert pictures(tmp_path / "without") == {}
    for part in ("unet", "text_encoder"):
        mine, others = (weights_of(tmp_path / name, part) for name in ("with", "without"))
        assert mine.keys() == others.keys()
        assert all(np.array_equal(mine[name], others[name]) for name in mine)


def test_they_are_scored_reported_and_their_cost_is_logged(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("mine", "--log_level=info") == 0
    shown = capsys.readouterr()
    assert "the meter's pictures of step 4: what guidance multiplies is 3.00 times" in shown.err
    scores = json.loads((tmp_path / "mine-output" / "meter" / "scores.json").read_text())
    assert list(scores) == ["0", "4", "6"]
    for row in scores.values():
        assert list(row) == ["subject", "class_kept", "other_class_kept", "clean"]
        assert all(0 <= value <= 1 for value in row.values())
    assert scores["0"]["clean"] == 1  # it is measured against itself
    assert re.search(r"the meter's pictures of step 6: subject \d\.\d\d, class kept \d", shown.err)
    assert re.search(r"the meter's pictures took \d+\.\d s, \d+\.\d % of the training's", shown.err)
    assert not re.search("^(subject_score|class_kept|clean)=", shown.out, re.MULTILINE)
    html = (tmp_path / "mine-output" / "report.html").read_text()
    assert [int(step) for step in re.findall(r"<h3[^>]*>Step (\d+)", html)] == [0, 4, 6]
    assert html.count('alt="a photo of riobugger cat on a beach, meter, step') == 3
    assert html.count("subject 0.") + html.count("subject 1.") == 3


def test_with_compute_scores_the_base_is_given_back_once(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []
    give_back = scoring.give_back_the_base

    def counted(*arguments: Any) -> None:
        given.append(1)
        give_back(*arguments)

    monkeypatch.setattr(scoring, "give_back_the_base", counted)
    monkeypatch.setattr(scoring, "SCORED_PICTURES", 1)
    monkeypatch.setattr(scoring, "SCORED_STEPS", 2)
    assert start("mine", "--compute_scores") == 0
    assert given == [1]
    scores = json.loads((tmp_path / "mine-output" / "meter" / "scores.json").read_text())
    assert list(scores["6"]) == ["subject", "class_kept", "other_class_kept", "clean"]


def test_a_resumed_run_draws_what_the_unbroken_one_draws_and_nothing_twice(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert start("whole") == 0
    kept = f"--checkpoint_dir={tmp_path / 'kept'}"
    options = ("--checkpointing_steps=1", "--checkpoints_total_limit=9", kept)
    draw, drawn = Previews.pictures, [0]

    def stopped(self: Previews, *arguments: Any, **more: Any) -> Any:
        drawn[0] += 1
        if drawn[0] == 2:  # at the turn, after step 4
            raise Stopped(signal.SIGTERM)
        return draw(self, *arguments, **more)

    monkeypatch.setattr(Previews, "pictures", stopped)
    assert start("broken", *options) == 143
    assert pictures(tmp_path / "broken").keys() == names(0)
    assert start("broken", *options) == 0
    whole = pictures(tmp_path / "whole")
    assert whole.keys() == names(0, 4, 6)
    assert pictures(tmp_path / "broken") == whole
    assert drawn == [5]  # start, turn, turn again, the last sample and the end
    rows = (tmp_path / "broken-output" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    scores = [
        (tmp_path / f"{name}-output" / "meter" / "scores.json") for name in ("whole", "broken")
    ]
    assert scores[0].read_text() == scores[1].read_text()


def test_without_those_of_the_start_there_are_fewer_scores(start: Start, tmp_path: Path) -> None:
    kept = f"--checkpoint_dir={tmp_path / 'kept'}"
    assert start("mine", "--max_steps=5", "--keep_last_checkpoint", kept) == 0
    for path in (tmp_path / "mine-output" / "meter").iterdir():
        path.unlink()  # as on another Spot machine
    assert start("mine", kept) == 0
    assert pictures(tmp_path / "mine").keys() == names(6)
    scores = json.loads((tmp_path / "mine-output" / "meter" / "scores.json").read_text())
    assert scores == {"6": {}}  # without the judge each of them needs the base


def test_those_of_the_end_show_the_state_that_early_stopping_has_chosen(
    start: Start, tmp_path: Path
) -> None:
    assert start("mine", "--early_stopping") == 0
    mine = pictures(tmp_path / "mine")
    assert mine.keys() == names(0, 3, 4)  # 4 was the first bad reading
    model = models.load(tmp_path / "mine", device=torch.device("cpu"))
    request = SamplingRequest(
        prompt="a photo of riobugger cat",
        num_inference_steps=2,
        seed=derive_seed(0, "meter picture"),
    )
    (drawn,) = sampling.generate(model, [request])
    assert drawn is not None
    with Image.open(io.BytesIO(mine["step-000003-subject.png"])) as kept:
        assert np.abs(np.asarray(kept).astype(int) - drawn).max() <= 2
    html = (tmp_path / "mine-output" / "report.html").read_text()
    assert '<h3 class="chosen">Step 3, the model that was kept' in html
    assert html.count('class="four chosen"') == 1


def test_no_fault_in_drawing_or_scoring_costs_the_model(
    start: Start,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("something odd")

    (tmp_path / "unwritten-output").mkdir()
    (tmp_path / "unwritten-output" / "meter").write_text("where a folder is to be made")
    assert start("unwritten") == 0
    shown = capsys.readouterr().err
    assert "no picture of the meter: A picture of the meter" in shown
    assert "the meter's pictures have no scores: A picture of the meter" in shown
    monkeypatch.setattr(Previews, "draw", fail)
    assert start("undrawn") == 0
    shown = capsys.readouterr().err
    assert "no picture of the meter: RuntimeError: something odd" in shown
    assert pictures(tmp_path / "undrawn") == {}
    for name in ("unwritten", "undrawn"):
        assert (tmp_path / name / "model_index.json").is_file()


def test_a_run_too_short_for_them_says_so_in_one_sentence(
    start: Start,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dreambooth.training.meter_budget.moments", lambda *_, **__: 0)
    monkeypatch.setattr("dreambooth.training.meter_budget.PICTURE_ROWS", 100)
    said = "the meter draws no pictures: 4 of them take 22.22 of this run's work, more than "
    assert start("mine", "--log_level=info") == 0
    assert capsys.readouterr().err.count(f"{said}meter_pictures_share=0.15") == 1
    assert not (tmp_path / "mine-output" / "meter").exists()


def test_several_subjects_have_their_pictures_and_their_scores_together(
    start: Start, tmp_path: Path
) -> None:
    subjects = []
    for name in ("cat", "dog"):
        folder = tmp_path / "both" / name
        folder.mkdir(parents=True)
        for path in (tmp_path / "data").glob("*.png"):
            (folder / path.name).symlink_to(path)
        prompts = {
            "instance_prompt": f"a photo of zwx {name}",
            "class_prompt": f"a photo of {name}",
        }
        subjects.append({"folder": name, **prompts})
    (tmp_path / "both" / "dataset_info.json").write_text(json.dumps({"subjects": subjects}))
    assert start("mine", f"--train={tmp_path / 'both'}", "--max_steps=3") == 0
    kinds = ("subject", "place", "subject_2", "place_2", "class", "class_2", "other_class")
    assert pictures(tmp_path / "mine").keys() == {
        f"step-{step:06d}-{kind}.png" for step in (0, 3) for kind in kinds
    }
    scores = json.loads((tmp_path / "mine-output" / "meter" / "scores.json").read_text())
    for row in scores.values():
        assert list(row) == ["subject", "class_kept", "other_class_kept", "clean"]
    assert scores["0"]["clean"] == 1
