"""A job that leaves the background out of the subject's loss."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from dreambooth.job.run import run_job

Start = Callable[..., int]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(3):
        pixels = generator.integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "dataset_info.json").write_text(json.dumps({"instance_prompt": "a photo of cat"}))
    return folder


@pytest.fixture
def start(small_model_folder: Path, photos: Path, tmp_path: Path) -> Start:
    def run(name: str, *options: str) -> int:
        argv = [f"--pretrained-model={small_model_folder}", f"--train={photos}", "--max_steps=2"]
        argv += [f"--model_dir={tmp_path / name}", "--learning_rate=0.001", *options]
        return run_job(argv, {"SAGEMAKER_BASE_DIR": str(tmp_path / "none")})

    return run


def unet_of(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def equal(one: Path, other: Path) -> bool:
    mine, others = unet_of(one), unet_of(other)
    return all(np.array_equal(mine[name], others[name]) for name in mine)


def losses(model_dir: Path) -> list[float]:
    output = model_dir.with_name(f"{model_dir.name}-output")
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["instance_loss"] for line in lines]


def put_masks(photos: Path) -> None:
    for number in range(3):
        mask = Image.new("L", (40, 40), 0)
        mask.paste(255, (0, 0, 16, 40))
        mask.save(photos / f"{number}.mask.png")


def test_masked_loss(start: Start, photos: Path, tmp_path: Path) -> None:
    assert start("plain") == 0
    put_masks(photos)
    assert start("unused") == 0
    assert start("used", "--masked_loss") == 0
    assert equal(tmp_path / "plain", tmp_path / "unused")
    assert not equal(tmp_path / "plain", tmp_path / "used")
    for name, options in {
        "freed": ["--memory_plan=fp32_adamw_in_backward"],
        "fast": ["--fast_step", "--mixed_precision=bf16", "--memory_plan=fp32_adamw"],
    }.items():
        assert start(name, "--masked_loss", *options) == 0
    assert losses(tmp_path / "freed")[0] == pytest.approx(losses(tmp_path / "used")[0], rel=1e-5)
    assert losses(tmp_path / "fast")[0] == pytest.approx(losses(tmp_path / "used")[0], rel=0.05)


def test_what_is_wrong_with_a_mask_is_said_before_training(
    start: Start, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("none", "--masked_loss") == 1
    assert "no instance image has a mask: put NAME.mask.png" in capsys.readouterr().err
    Image.new("L", (30, 40), 255).save(photos / "1.mask.png")
    assert start("size", "--masked_loss") == 1
    shown = capsys.readouterr().err
    assert "1.mask.png is 30 x 40 pixels and its picture 40 x 40: make them equal" in shown
    Image.new("L", (40, 40), 0).save(photos / "1.mask.png")
    assert start("black", "--masked_loss") == 1
    assert "1.mask.png hides all of the picture" in capsys.readouterr().err
    assert not (tmp_path / "black" / "model_index.json").exists()
