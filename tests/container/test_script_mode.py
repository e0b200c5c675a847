"""Script mode without docker: SageMaker's training toolkit runs our entry point from a source_dir.

DREAMBOOTH_TRAINING_TOOLKIT names the `train` command of an environment with sagemaker-training; it
trains with the packages of the environment that runs this test.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from dreambooth.tiny import DATA

ROOT = Path(__file__).parents[2]


@pytest.fixture
def base_dir(tmp_path: Path) -> Path:
    root = tmp_path / "ml"
    for folder in ("input/config", "input/data", "model", "output"):
        (root / folder).mkdir(parents=True)
    shutil.copytree(DATA / "cat", root / "input/data/training")
    resources = {
        "current_host": "localhost",
        "hosts": ["localhost"],
        "network_interface_name": "lo",
    }
    (root / "input/config/resourceconfig.json").write_text(json.dumps(resources))
    channels = {"training": {"TrainingInputMode": "File"}}
    (root / "input/config/inputdataconfig.json").write_text(json.dumps(channels))
    return root


@pytest.fixture
def source_dir(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("transfer_learning.py", "requirements.txt"):
        shutil.copy(ROOT / name, source / name)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "dreambooth", source / "dreambooth", ignore=ignored)
    return source


def run_toolkit(
    base_dir: Path, source_dir: Path, **settings: str
) -> subprocess.CompletedProcess[str]:
    command = os.environ.get("DREAMBOOTH_TRAINING_TOOLKIT")
    if not command:
        pytest.skip("DREAMBOOTH_TRAINING_TOOLKIT names no `train`: see `make test-container`")
    values = {name: json.dumps(value) for name, value in settings.items()}
    values |= {
        "sagemaker_program": json.dumps("transfer_learning.py"),
        "sagemaker_submit_directory": json.dumps(str(source_dir)),
    }
    (base_dir / "input/config/hyperparameters.json").write_text(json.dumps(values))
    environ = {
        **os.environ,
        "SAGEMAKER_BASE_DIR": str(base_dir),
        "PYTHONPATH": sysconfig.get_path("purelib"),
        "PATH": f"{Path(command).parent}:{os.environ['PATH']}",
    }
    return subprocess.run(
        [command], env=environ, capture_output=True, text=True, timeout=300, check=False
    )


def test_the_toolkit_trains_with_our_entry_point(base_dir: Path, source_dir: Path) -> None:
    settings = {"pretrained_model": "tiny", "max_steps": "3", "with_prior_preservation": "False"}
    done = run_toolkit(base_dir, source_dir, **settings)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert (base_dir / "model" / "model_index.json").is_file()
    assert (base_dir / "output" / "data" / "report.html").is_file()
    assert not (base_dir / "output" / "failure").exists()


def test_a_wrong_setting_fails_the_toolkits_job(base_dir: Path, source_dir: Path) -> None:
    done = run_toolkit(base_dir, source_dir, pretrained_model="tiny", max_steps="-3")
    assert done.returncode != 0
    assert "max_steps" in (base_dir / "output" / "failure").read_text()
    assert not (base_dir / "model" / "model_index.json").exists()
