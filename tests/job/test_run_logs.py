"""The log of a job: its lines say where and when, keep secrets, and never stop the job."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreambooth.job.run import run_job

ROOT = Path(__file__).parents[2]
LINE = re.compile(r"\d\d:\d\d:\d\d [A-Z]+ \[([a-z_ ]+)(?:, step (\d+))?\] .")
PROGRESS = re.compile(r"\d\d:\d\d:\d\d [a-z ]+: \d+/\d+")  # time, phase and count


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "1.png")
    prompts = {"instance_prompt": "a photo of riobugger cat", "class_prompt": "a photo of cat"}
    (folder / "dataset_info.json").write_text(json.dumps(prompts))
    return folder


def argv(model: Path, photos: Path, out: Path, *more: str) -> list[str]:
    paths = ["--pretrained-model", str(model), "--train", str(photos), "--model_dir", str(out)]
    return [*paths, "--max_steps=2", *more]


def test_every_line_says_when_in_which_phase_and_after_which_step(
    small_model_folder: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--with_prior_preservation", "--num_class_images=1", "--sample_steps=1"]
    options += ["--unknown_option=1", f"--checkpoint_dir={tmp_path / 'c'}"]
    options += ["--checkpointing_steps=1", "--log_level=debug"]
    assert run_job(argv(small_model_folder, photos, tmp_path / "model", *options), {}) == 0
    lines = capsys.readouterr().err.splitlines()
    events = [line for line in lines if not PROGRESS.match(line)]
    assert [line for line in events if not LINE.match(line)] == []
    seen = [match.groups() for line in events if (match := LINE.match(line))]
    assert {phase for phase, _ in seen} == {
        *("starting", "job", "class images", "loading the model", "encoding", "resuming"),
        "training",
        *("checkpoints", "sample pictures", "export"),
    }
    steps = [int(step) if step else 0 for _, step in seen]
    assert steps == sorted(steps)
    assert steps[-1] == 2


def test_a_prompt_that_is_cut_is_reported_once(
    small_model_folder: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = {"instance_prompt": "a cat " * 20}
    (photos / "dataset_info.json").write_text(json.dumps(prompts))
    options = ["--sample_steps=1"]
    assert run_job(argv(small_model_folder, photos, tmp_path / "model", *options), {}) == 0
    assert capsys.readouterr().err.count("longer than the 32 tokens") == 1


def test_the_log_level_decides_what_is_reported(
    small_model_folder: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    levels = {}
    for level in ("debug", "info", "warning", "error"):
        options = ["--unknown_option=1", f"--log_level={level}"]
        options += [f"--checkpoint_dir={tmp_path / 'c'}", "--checkpointing_steps=1"]
        assert run_job(argv(small_model_folder, photos, tmp_path / "model", *options), {}) == 0
        levels[level] = set(re.findall(r"^[\d:]+ ([A-Z]+) ", capsys.readouterr().err, re.MULTILINE))
    assert levels == {
        "debug": {"DEBUG", "INFO", "WARNING"},
        "info": {"INFO", "WARNING"},
        "warning": {"WARNING"},
        "error": set(),
    }


def test_the_last_lines_before_a_failure_name_its_place_and_cause(
    small_model_folder: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--learning_rate=1", "--max_grad_norm=1e9", "--adam_weight_decay=1e30"]
    out = tmp_path / "model"
    assert run_job(argv(small_model_folder, photos, out, *options, "--max_steps=20"), {}) == 1
    lines = capsys.readouterr().err.splitlines()
    place = next(n for n, line in enumerate(lines) if line.endswith("the job fails here"))
    assert re.search(r" INFO \[training, step \d+\] the job fails here", lines[place])
    # Followed only by the last progress line, the report's place and the error.
    assert place >= len(lines) - 4
    assert re.match(r"error: .* is not finite at step \d+ \(learning rate 1\)", lines[-1])


@pytest.mark.parametrize("options", [[], ["--max_steps=none"], ["--learning_rate=1e9"]])
def test_no_variable_of_aws_is_ever_shown_or_written(
    small_model_folder: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
) -> None:
    names = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"]
    names.append("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI")
    for name in names:
        monkeypatch.setenv(name, f"secret-of-{name}")
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(tmp_path / "root"))
    (tmp_path / "root" / "output").mkdir(parents=True)
    run_job(
        argv(small_model_folder, photos, tmp_path / "model", "--log_level=debug", *options),
        os.environ,
    )
    shown = capsys.readouterr()
    assert "secret-of-" not in shown.out + shown.err
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if b"secret-of-" in path.read_bytes()]
    assert not [path for path in written if b"AWS_" in path.read_bytes()]


def test_a_log_that_cannot_be_written_costs_no_training(
    small_model_folder: Path, photos: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    words = argv(small_model_folder, photos, model)
    command = " ".join([sys.executable, "transfer_learning.py", *words])
    full_and_closed = f"{command} >/dev/full 2> >(true)"
    assert subprocess.run(["bash", "-c", full_and_closed], cwd=ROOT).returncode == 0
    assert (model / "model_index.json").is_file()


def test_a_failure_is_written_down_where_it_cannot_be_shown(tmp_path: Path) -> None:
    (tmp_path / "output").mkdir()
    for redirection in ("2>/dev/full", "2>&-", "2>&1 | true"):
        command = f"{sys.executable} transfer_learning.py --max_steps=many {redirection}"
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {command}"],
            cwd=ROOT,
            env={**os.environ, "SAGEMAKER_BASE_DIR": str(tmp_path)},
        )
        assert done.returncode == 1, redirection
        assert "max_steps" in (tmp_path / "output" / "failure").read_text()
        (tmp_path / "output" / "failure").unlink()
