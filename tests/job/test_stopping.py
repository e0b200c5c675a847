"""What a stop writes on a slow disk; test_run.py has the cases without one."""

from __future__ import annotations

import json
import os
import signal
import sys
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreambooth import tiny
from dreambooth.job import stopping
from dreambooth.job.run import run_job
from dreambooth.model_folder.source import read_facts
from tests.stopped_run import checked_checkpoint, size, stop_in_training


class StopInTraining(StringIO):
    """A stderr that sends SIGTERM to this process when training begins."""

    def write(self, text: str) -> int:
        if "training: 0/" in text:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().write(text)


@pytest.mark.parametrize("checkpoints", [True, False])
def test_where_no_time_is_left_the_checkpoint_goes_before_the_model(
    small_model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    checkpoints: bool,
) -> None:
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.zeros((40, 40, 3), dtype=np.uint8)).save(tmp_path / "photos" / "1.png")
    prompts = {"instance_prompt": "a photo of riobugger cat"}
    (tmp_path / "photos" / "dataset_info.json").write_text(json.dumps(prompts))
    monkeypatch.setattr(stopping, "MARGIN", 1e12)  # as if the disk were very slow
    monkeypatch.setattr(sys, "stderr", StopInTraining())
    argv = ["--pretrained-model", str(small_model_folder), "--train", str(tmp_path / "photos")]
    argv += ["--model_dir", str(tmp_path / "model"), "--max_steps=5"]
    argv += [f"--checkpoint_dir={tmp_path / 'c'}"] if checkpoints else []
    assert run_job(argv, {}) == 143
    model = tmp_path / "model" / "model_index.json"
    assert model.exists() is not checkpoints
    if checkpoints:
        assert [path.name for path in (tmp_path / "c").iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("checkpoints", [True, False], ids=["checkpoint", "no checkpoint"])
def test_a_real_process_on_a_slow_disk_leaves_what_there_is_time_for(
    tmp_path: Path, checkpoints: bool
) -> None:
    mine, kept = tmp_path / "mine", tmp_path / "kept"
    # At this speed a checkpoint of 58 MB takes all of the time allowed, and a model of 24 MB 1.2 s.
    bytes_per_second, stop_seconds = 20e6, 2.5
    arguments = ["--pretrained-model", tiny.WEIGHTS, "--train", tiny.DATA / "dog1_8"]
    arguments += ["--model_dir", mine, "--max_steps=1000"]
    arguments += ["--with_prior_preservation=False", "--instance_prompt=a photo of riobugger dog"]
    arguments += [f"--checkpoint_dir={kept}"] if checkpoints else []
    run = stop_in_training(
        arguments,
        tmp_path,
        metrics=tmp_path / "mine-output" / "metrics.jsonl",
        bytes_per_second=bytes_per_second,
        stop_seconds=stop_seconds,
    )
    assert run.code == 143, run.log
    written = checked_checkpoint(kept) if checkpoints else 0
    if checkpoints:
        assert not mine.exists() or not list(mine.iterdir())
    else:
        assert read_facts(mine) == read_facts(tiny.WEIGHTS)
        assert "**Partial:" in (mine / "README.md").read_text("utf-8")
        assert not list(mine.glob(".partial-*"))
    assert run.flushed >= written + (size(mine) if mine.exists() else 0)
    # The disk was slow, and everything else took less than a minute.
    assert run.flushed / bytes_per_second <= run.seconds < 60
