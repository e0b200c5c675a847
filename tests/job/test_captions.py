"""Whole jobs whose pictures have captions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dreambooth.diffusion import model as models
from dreambooth.job.run import run_job
from tests.job.test_several_subjects import weights

Start = Callable[..., int]
PROMPT = "a photo of riobugger cat"
CAPTION = "riobugger cat on beach"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(3):
        pixels = generator.integers(0, 255, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "dataset_info.json").write_text(json.dumps({"instance_prompt": PROMPT}))
    return folder


@pytest.fixture
def start(small_model_folder: Path, tmp_path: Path, photos: Path) -> Start:
    def run(out: str, *options: str) -> int:
        argv = [f"--pretrained-model={small_model_folder}", f"--train={photos}", "--max_steps=3"]
        argv += [f"--model_dir={tmp_path / out}", "--learning_rate=1e-3", *options]
        return run_job(argv, {"SAGEMAKER_BASE_DIR": str(tmp_path)})

    return run


def test_captions_are_trained_encoded_once_shown_and_part_of_the_identity(
    start: Start,
    tmp_path: Path,
    photos: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert start("plain") == 0
    assert "<q>" + PROMPT + "</q></figcaption>" not in report(tmp_path / "plain")
    for number in (0, 2):
        (photos / f"{number}.txt").write_text(CAPTION)
    encoded: list[str] = []
    tokenize = models.tokenize

    def noted(model: models.DiffusionModel, prompts: list[str]) -> torch.Tensor:
        encoded.extend(prompts)
        return tokenize(model, prompts)

    monkeypatch.setattr(models, "tokenize", noted)
    kept = (f"--checkpoint_dir={tmp_path / 'checkpoints'}", "--keep_last_checkpoint")
    assert start("captions", *kept) == 0
    assert encoded.count(CAPTION) == 1
    assert not torch.equal(weights(tmp_path / "captions"), weights(tmp_path / "plain"))
    page = report(tmp_path / "captions")
    assert page.count(f"<q>{CAPTION}</q>") == 2
    assert "2 with captions of their own" in capsys.readouterr().out
    (photos / "0.txt").write_text("riobugger cat")
    assert start("captions", *kept) == 1
    assert "belongs to another job: data was" in capsys.readouterr().err


def test_captions_that_are_the_instance_prompt_learn_the_same(
    start: Start, tmp_path: Path, photos: Path
) -> None:
    assert start("plain") == 0
    (photos / "1.txt").write_text(PROMPT)
    assert start("captions") == 0
    assert torch.equal(weights(tmp_path / "captions"), weights(tmp_path / "plain"))


def report(folder: Path) -> str:
    return (folder.with_name(folder.name + "-output") / "report.html").read_text()
