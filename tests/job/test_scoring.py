"""compute_scores in real jobs: the printed shares, and faults that must not cost the model."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dreambooth import tiny
from dreambooth.evaluation import shares
from dreambooth.job import scoring
from dreambooth.job.run import run_job
from dreambooth.process.stop import Stopped

Start = Callable[..., int]
JUDGE = "the judge of the embedded world"


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Return a function that runs a job of the embedded model with compute_scores."""

    def run(*options: str, train: Path = tiny.DATA / "dog2_4", model: object = "tiny") -> int:
        argv = [f"--pretrained-model={model}", f"--train={train}", "--compute_scores"]
        return run_job([*argv, f"--model_dir={tmp_path / 'model'}", "--max_steps=2", *options], {})

    return run


def printed(shown: str) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in re.findall(r"^(subject_score|class_kept|clean)=(\d\.\d+)$", shown, re.M)
    }


def test_the_shares_are_printed_and_reported(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("--compute_fid") == 0
    shown = capsys.readouterr()
    assert list(printed(shown.out)) == ["subject_score", "class_kept", "clean"]
    assert all(0 <= value <= 1 for value in printed(shown.out).values())
    assert "subject_score=" not in shown.err
    # The metric definitions of docs/sagemaker.md read equal digits.
    text = (Path(__file__).parents[2] / "docs" / "sagemaker.md").read_text()
    definitions = re.findall(r'{"Name": "(\w+)", "Regex": r"([^"]+)"}', text)
    assert len(definitions) == 5
    for name, regex in definitions:
        lines = [line for line in shown.out.splitlines() if re.search(rf"\b{name}=", line)]
        assert lines
        assert re.findall(regex, shown.out) == [line.partition("=")[2] for line in lines]
    assert f"features: {JUDGE}" in shown.err
    assert "  scores           at the end, from 8 pictures of 50 steps" in shown.out
    page = (tmp_path / "model-output" / "report.html").read_text()
    assert "<h2>Scores</h2>" in page
    assert "subject_score" in page


def test_the_model_draws_first_and_the_base_after_it(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both draw all prompts from equal seeds, with their own weights; nothing is left of these."""
    drawings: list[tuple[str, str]] = []
    seen: list[shares.MeasuredPictures] = []
    draw, measured = scoring._draw, shares.measured

    def noted(task: Any, previews: Any, prompts: Any, label: str) -> Any:
        unet = previews.model.unet.state_dict()
        text = previews.model.text_encoder.state_dict()
        for folder in (tmp_path / "model", tiny.WEIGHTS):
            name = folder / "unet" / "diffusion_pytorch_model.safetensors"
            other = folder / "text_encoder" / "model.safetensors"
            if all(torch.equal(unet[n], w.float()) for n, w in load_file(name).items()) and all(
                torch.equal(text[n], w.float()) for n, w in load_file(other).items() if n in text
            ):
                drawings.append((folder.name, label))
        return draw(task, previews, prompts, label)

    def kept(asked: Any, pictures: shares.MeasuredPictures, network: Any, **more: Any) -> Any:
        seen.append(pictures)
        return measured(asked, pictures, network, **more)

    monkeypatch.setattr(scoring, "_draw", noted)
    monkeypatch.setattr(shares, "measured", kept)
    assert start("--train_text_encoder", "--learning_rate=0.001", "--resolution=64") == 0
    assert [name for name, _ in drawings] == ["model", "weights"]
    (pictures,) = seen
    assert (
        list(pictures.drawn) == list(pictures.base) == ["a photo of a zwx dog", "a photo of a dog"]
    )
    for prompt, drawn in pictures.drawn.items():
        assert not any(
            np.array_equal(a, b) for a, b in zip(drawn, pictures.base[prompt], strict=True)
        )


def test_a_model_that_learned_nothing_draws_as_its_base(
    start: Start, small_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[shares.MeasuredPictures] = []
    measured = shares.measured

    def kept(asked: Any, pictures: shares.MeasuredPictures, network: Any, **more: Any) -> Any:
        seen.append(pictures)
        return measured(asked, pictures, network, **more)

    monkeypatch.setattr(shares, "measured", kept)
    assert start("--learning_rate=1e-12", model=small_model_folder) == 0
    (pictures,) = seen
    for prompt, drawn in pictures.drawn.items():
        for mine, base in zip(drawn, pictures.base[prompt], strict=True):
            assert mine is not None
            assert base is not None
            assert np.abs(mine.astype(int) - base).max() <= 2


def test_a_class_prompt_is_asked_for_at_the_start(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for path in (tiny.DATA / "dog2_4").glob("*.png"):
        (photos / path.name).symlink_to(path)
    (photos / "dataset_info.json").write_text(json.dumps({"instance_prompt": "a photo of zwx dog"}))
    assert start("--dry-run", train=photos) == 0
    shown = capsys.readouterr()
    assert "compute_scores needs a class_prompt" in shown.err
    assert "  scores           at the end" in shown.out
    assert start(train=photos) == 0
    shown = capsys.readouterr()
    # Neither the judge nor the base needs class pictures for these.
    assert list(printed(shown.out)) == ["subject_score", "clean"]
    assert "no class_kept: dataset_info.json gives no class_prompt" in shown.err


def test_no_fault_in_scoring_costs_the_model(
    start: Start,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        assert (tmp_path / "model" / "model_index.json").is_file()
        raise RuntimeError("something odd")

    monkeypatch.setattr(scoring, "give_back_the_base", fail)
    assert start() == 0
    shown = capsys.readouterr()
    assert printed(shown.out) == {}
    assert " WARNING [scores, step 2] no scores: RuntimeError: something odd" in shown.err
    assert "no scores" in (tmp_path / "model-output" / "report.html").read_text()


@pytest.mark.parametrize("end", [KeyboardInterrupt(), Stopped(signal.SIGTERM)])
def test_what_ends_a_process_ends_the_scoring(
    monkeypatch: pytest.MonkeyPatch, end: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise end

    monkeypatch.setattr(scoring, "_measure", fail)
    nothing: Any = None
    with pytest.raises(type(end)):
        scoring.print_scores(nothing, nothing, nothing, nothing)
