"""Several processes on one host, as torchrun and as the container's own verb start them.

One scenario, as each start of two processes takes ten seconds of processor time.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from dreambooth.job.run import run_job
from tests.documents import shell_lines

ROOT = Path(__file__).parents[2]
UNET, TEXT = "unet/diffusion_pytorch_model", "text_encoder/model"
ENVIRON = {
    **os.environ,
    "PATH": os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"])),
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(3):
        pixels = generator.integers(0, 255, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    prompts = {"instance_prompt": "a photo of riobugger cat", "class_prompt": "a photo of cat"}
    (folder / "dataset_info.json").write_text(json.dumps(prompts))
    return folder


def sampled(output: Path) -> dict[str, bytes]:
    """Return the class images and their latents, by name."""
    files = [path for path in (output / "class_images").rglob("*") if path.is_file()]
    return {str(path.relative_to(output)): path.read_bytes() for path in files}


def metric(name: str, shown: str) -> float:
    (value,) = re.findall(f"^{name}=([0-9.]+)$", shown, re.MULTILINE)
    return float(value)


def weights(path: Path) -> dict[str, np.ndarray]:
    return load_file(path.with_suffix(".safetensors"))


def test_two_processes_on_one_host(
    small_model_folder: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    common = ["--pretrained-model", str(small_model_folder), "--train", str(photos)]
    common += ["--learning_rate=0.0001", "--train_text_encoder", "--with_prior_preservation"]
    common += ["--num_class_images=10", "--center_crop"]
    trained = [*common, "--max_steps=4", "--checkpointing_steps=2", "--checkpoints_total_limit=9"]
    one, two = tmp_path / "one", tmp_path / "two"

    # One process with the doubled batch
    assert run_job([*trained, "--batch_size=2", "--compute_fid", f"--model_dir={one}"], {}) == 0
    alone = capsys.readouterr().out

    # Two processes of torchrun
    (documented,) = [words for words in shell_lines() if words[0] == "torchrun"]
    launch = documented[:4]
    assert launch == ["torchrun", "--nproc_per_node", "2", "transfer_learning.py"]
    done = subprocess.run(
        [*launch, *trained, "--keep_last_checkpoint", "--compute_fid", f"--model_dir={two}"],
        check=True,
        cwd=ROOT,
        env=ENVIRON,
        capture_output=True,
        text=True,
    )
    # Only one process prints and reports, and the loss is of both processes' pictures.
    assert metric("fid_score", done.stdout) > 0
    assert metric("End of training: train_avg_loss", done.stdout) == pytest.approx(
        metric("End of training: train_avg_loss", alone), rel=1e-3
    )
    assert "fid_score=" not in done.stderr
    assert done.stderr.count("the report is in") == 1
    for part in (UNET, TEXT):
        base, first, second = (weights(at / part) for at in (small_model_folder, one, two))
        moved = np.concatenate([(first[name] - base[name]).ravel() for name in base])
        other = np.concatenate([(second[name] - base[name]).ravel() for name in base])
        # Without shared gradients this would be 0.85; weights whose gradient is zero except for
        # rounding keep it below 1.
        assert moved @ other / np.linalg.norm(moved) / np.linalg.norm(other) > 0.99, part

    # Two processes of the verb go on from step 2, to the same bits, and are stopped
    output = tmp_path / "two-output"
    # Each process has sampled a batch, of 8 and of 2 class images, as one process does.
    assert len(sampled(output)) == 20
    assert sampled(output) == sampled(tmp_path / "one-output")
    checkpoints = tmp_path / "three-output" / "checkpoints"
    shutil.copytree(output / "checkpoints" / "step-00000002", checkpoints / "step-00000002")
    endless = [*common, "--max_steps=100000", "--checkpointing_steps=2", "--processes=2"]
    endless += ["--checkpoints_total_limit=9", f"--model_dir={tmp_path / 'three'}"]
    job = _started(endless, tmp_path)
    _wait_for(job, checkpoints / "step-00000004")
    assert len(list((tmp_path / "temporary").glob("*/end-*.met"))) == 2
    job.send_signal(signal.SIGTERM)
    shown = _shown_at_the_end(job, code=143)
    assert shown.splitlines()[-1] == "stopped by SIGTERM"
    assert "Traceback" not in shown
    assert shown.count("the report is in") == shown.count("resumed at step 2") == 1
    assert "2 processes: global batch 2" in shown
    assert "**Partial:" in (tmp_path / "three" / "README.md").read_text()
    for name in ("unet", "text_encoder"):
        files = [at / "step-00000004" / name for at in (output / "checkpoints", checkpoints)]
        there, here = (weights(file) for file in files)
        assert all(np.array_equal(there[key], here[key]) for key in there)
    assert sampled(tmp_path / "three-output") == sampled(output)

    # One of them is killed
    last = max(path.name for path in checkpoints.iterdir())
    job = _started(endless, tmp_path)
    _wait_for(job, checkpoints / f"step-{int(last[5:]) // 2 * 2 + 4:08d}")
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    assert len(children) == 2
    os.kill(int(children[1]), signal.SIGKILL)
    shown = _shown_at_the_end(job, code=1)
    assert "Traceback" not in shown
    (sentence,) = [line for line in shown.splitlines() if line.startswith("error: ")]
    assert "ended by SIGKILL" in sentence
    assert (tmp_path / "root" / "output" / "failure").read_text() == sentence[len("error: ") :]
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    for whole in checkpoints.glob("step-*"):
        assert (whole / "manifest.json").is_file()
    assert not list(checkpoints.glob(".partial-*/manifest.json"))


def _started(argv: list[str], folder: Path) -> subprocess.Popen[str]:
    """Start `train` as the container does, with its output in a file of the folder."""
    for new in (folder / "root" / "output", folder / "temporary"):
        new.mkdir(parents=True, exist_ok=True)
    environ = {"SAGEMAKER_BASE_DIR": str(folder / "root"), "TMPDIR": str(folder / "temporary")}
    with (folder / "shown").open("w") as shown:
        return subprocess.Popen(
            [sys.executable, "-m", "dreambooth", "train", *argv],
            cwd=ROOT,
            env={**ENVIRON, **environ},
            stdout=shown,
            stderr=subprocess.STDOUT,
            text=True,
        )


def _wait_for(job: subprocess.Popen[str], path: Path) -> None:
    until = time.monotonic() + 240
    while not path.exists() and time.monotonic() < until and job.poll() is None:
        time.sleep(0.05)
    assert path.exists()


def _shown_at_the_end(job: subprocess.Popen[str], *, code: int) -> str:
    """Return what a job that ends now has printed."""
    ended = job.wait(timeout=120)
    assert isinstance(job.args, list)
    folder = Path(next(str(word) for word in job.args if "--model_dir=" in str(word))[12:]).parent
    shown = (folder / "shown").read_text()
    assert ended == code, shown
    return shown
