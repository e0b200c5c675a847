"""One subject after the other: jobs whose base was fine-tuned before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dreambooth.job.run import run_job
from tests.job.test_several_subjects import metrics, weights

Start = Callable[..., int]
CLASS = {"cat": "a photo of cat", "dog": "a photo of dog"}
NAMES = {"first": "riobugger cat", "second": "doppler dog", "third": "zwx cat"}


@pytest.fixture
def start(small_model_folder: Path, tmp_path: Path) -> Start:
    """Return a function that teaches the next subject to a model, and writes out/<subject>."""
    generator = np.random.default_rng(0)
    for name, subject in NAMES.items():
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        pixels = generator.integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "0.png")
        info = {"instance_prompt": f"a photo of {subject}"}
        info["class_prompt"] = CLASS[subject.split()[1]]
        (folder / "dataset_info.json").write_text(json.dumps(info))

    def run(subject: str, *options: str, base: str | None = None, out: str | None = None) -> int:
        model = tmp_path / base if base else small_model_folder
        argv = [f"--pretrained-model={model}", f"--train={tmp_path / 'photos' / subject}"]
        argv += [f"--model_dir={tmp_path / (out or subject)}", "--learning_rate=1e-3"]
        return run_job([*argv, "--max_steps=3", *options], {"SAGEMAKER_BASE_DIR": str(tmp_path)})

    return run


def subjects_of(folder: Path) -> list[str]:
    info = json.loads((folder / "__model_info__.json").read_text())
    return [each["instance_prompt"].removeprefix("a photo of ") for each in info["subjects"]]


def test_a_chain_of_jobs_keeps_what_each_was_taught(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("first") == 0
    assert "kept subjects" not in capsys.readouterr().out
    assert "kept_loss" not in metrics(tmp_path / "first")[0]
    assert start("second", base="first") == 0
    assert "kept subjects    'a photo of riobugger cat', by the base's own prediction" in (
        capsys.readouterr().out
    )
    assert all(row["kept_loss"] for row in metrics(tmp_path / "second")[1:])
    page = (tmp_path / "second-output" / "report.html").read_text()
    assert "kept subjects" in page
    assert start("third", base="second") == 0
    assert subjects_of(tmp_path / "third") == [NAMES[name] for name in ("third", "second", "first")]
    card = (tmp_path / "third" / "README.md").read_text()
    assert "This model draws 3 subjects" in card
    assert start("first", base="third", out="again") == 0  # its own prompt is not held against it
    assert subjects_of(tmp_path / "again") == [NAMES[name] for name in ("first", "third", "second")]


def test_what_is_not_kept_is_not_carried_on(start: Start, tmp_path: Path) -> None:
    assert start("first") == 0
    assert start("second", "--keep_subjects=False", base="first") == 0
    assert subjects_of(tmp_path / "second") == [NAMES["second"]]
    assert "kept_loss" not in metrics(tmp_path / "second")[0]


def test_a_resumed_run_keeps_the_same_and_another_choice_is_refused(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("first") == 0
    mode = ("--with_prior_preservation", "--prior_preservation_mode=prediction", "--center_crop")
    assert start("second", *mode, base="first", out="whole") == 0
    kept = (*mode, f"--checkpoint_dir={tmp_path / 'checkpoints'}", "--keep_last_checkpoint")
    assert start("second", *kept, "--max_steps=2", base="first") == 0
    assert start("second", *kept, "--keep_subjects=True", base="first") == 0
    assert torch.equal(weights(tmp_path / "second"), weights(tmp_path / "whole"))
    assert start("second", *kept, "--keep_subjects=False", base="first") == 1
    assert "kept_subjects was " in (shown := capsys.readouterr().err)
    assert " and is now none" in shown


@pytest.mark.parametrize("how", ["auto", "True"])
def test_where_memory_runs_out_auto_goes_on_without_keeping(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    assert start("first") == 0
    failed = []

    def hook(optimizer: Any, *_: object) -> None:
        if not failed:
            failed.append(optimizer)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")

    handle = register_optimizer_step_pre_hook(hook)
    try:
        options = ("--memory_plan=fp32_adamw", f"--keep_subjects={how}")
        code = start("second", *options, base="first")
    finally:
        handle.remove()
    shown = capsys.readouterr().err
    assert code == (0 if how == "auto" else 1)
    assert ("going on with fp32_adamw without keeping the base's subjects" in shown) is (code == 0)
    if code == 0:
        assert subjects_of(tmp_path / "second") == [NAMES["second"]]
