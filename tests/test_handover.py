"""What a stop leaves on a slow disk; test_job holds the cases that need none."""

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

from dreambooth import handover, job


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
    monkeypatch.setattr(handover, "MARGIN", 1e12)  # as if the disk were so slow
    monkeypatch.setattr(sys, "stderr", StopInTraining())
    argv = ["--pretrained-model", str(small_model_folder), "--train", str(tmp_path / "photos")]
    argv += ["--model_dir", str(tmp_path / "model"), "--max_steps=5"]
    argv += [f"--checkpoint_dir={tmp_path / 'c'}"] if checkpoints else []
    assert job.run(argv, {}) == 143
    model = tmp_path / "model" / "model_index.json"
    assert model.exists() is not checkpoints
    if checkpoints:
        assert [path.name for path in (tmp_path / "c").iterdir()] == ["step-00000001"]
