"""A job that starts from one safetensors file: what its dry run says, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from dreambooth.job.run import run_job
from tests.model_folder.single_files import published, write_holes

ROOT = Path(__file__).parents[2]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (64, 64), "red").save(folder / "0.png")
    (folder / "dataset_info.json").write_text(json.dumps({"instance_prompt": "a photo of x"}))
    return folder


def test_a_dry_run_plans_for_it_without_torch(tmp_path: Path, photos: Path) -> None:
    channel = tmp_path / "channel"
    channel.mkdir()
    model = write_holes(channel / "sd2.safetensors", published("2.x"))
    argv = [f"--train={photos}", f"--model_dir={tmp_path / 'm'}", f"--pretrained-model={channel}"]
    argv += ["--dry-run", "--prediction_type=v_prediction", "--export_single_file=True"]
    code = (
        "import sys; from dreambooth.job.run import run_job; code = run_job(sys.argv[1:], {}); "
        "print('torch' in sys.modules); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("False\n")
    assert "768 x 768" in done.stdout
    assert "one file of it 4.81 GiB" in done.stdout
    assert "the unpacked base 4." in done.stdout
    assert f"{model} is Stable Diffusion 2.x in fp32: prediction_type is v_prediction" in (
        done.stderr
    )
    assert not (tmp_path / "m").exists()


def test_a_dry_run_asks_for_what_the_file_does_not_say(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_holes(tmp_path / "sd2.safetensors", published("2.x"))
    argv = [f"--train={photos}", f"--model_dir={tmp_path / 'm'}", f"--pretrained-model={model}"]
    assert run_job([*argv, "--dry-run"], {}) == 1
    assert "give --prediction_type=epsilon" in capsys.readouterr().err.splitlines()[-1]
