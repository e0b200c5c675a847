"""Disks that are too small: a tmpfs where the test may mount one, and a limit on file sizes."""

from __future__ import annotations

import json
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from dreambooth.errors import ResourceError
from dreambooth.job import outputs
from dreambooth.job.run import run_job
from dreambooth.training import run_log
from dreambooth.training.step_metrics import StepMetrics

pytestmark = pytest.mark.usefixtures("class_images_of_four_steps")
MIB = 2**20


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (2, 40, 48, 3), dtype=np.uint8)
    for number in range(2):
        Image.fromarray(pixels[number]).save(folder / f"{number}.png")
    prompts = {"instance_prompt": "a photo of riobugger cat", "class_prompt": "a photo of cat"}
    (folder / "dataset_info.json").write_text(json.dumps(prompts))
    return folder


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Yield a function that mounts a disk of `count` bytes, or resizes the one that is mounted."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount; the tests with a limit on files run for everybody")
    place = tmp_path / "disk"

    def sized(count: int) -> Path:
        option = f"size={count}" if not place.is_dir() else f"remount,size={count}"
        place.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", option, "tmpfs", place], check=True)
        return place

    yield sized
    if place.is_dir():
        subprocess.run(["umount", place], check=True)


def train(model: Path, photos: Path, place: Path, root: Path, *more: str) -> int:
    (root / "output").mkdir(parents=True, exist_ok=True)
    argv = ["--pretrained-model", str(model), "--train", str(photos)]
    argv += ["--model_dir", str(place / "model"), "--output_data_dir", str(place / "output")]
    argv += ["--checkpoint_dir", str(place / "checkpoints"), "--checkpointing_steps=1"]
    argv += ["--with_prior_preservation", "--num_class_images=1", "--max_steps=2"]
    return run_job([*argv, *more], {"SAGEMAKER_BASE_DIR": str(root)})


def used(folder: Path) -> int:
    status = os.statvfs(folder)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def errors(shown: str) -> list[str]:
    assert "Traceback" not in shown
    return [line for line in shown.splitlines() if line.startswith("error: ")]


def test_a_run_that_the_disk_cannot_hold_is_refused_before_anything_is_written(
    small_model_folder: Path,
    photos: Path,
    tmp_path: Path,
    disk: Callable[[int], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = disk(4 * MIB)
    assert train(small_model_folder, photos, place, tmp_path) == 1
    shown = capsys.readouterr()
    assert "2 checkpoints at a time" in shown.out
    (sentence,) = errors(shown.err)
    assert "has 4.0 MiB free, and this run needs" in sentence
    assert "checkpoints_total_limit" in sentence
    assert sentence == f"error: {(tmp_path / 'output' / 'failure').read_text()}"
    assert not list(place.iterdir())


def test_what_an_earlier_run_left_counts_as_room(
    small_model_folder: Path, photos: Path, tmp_path: Path, disk: Callable[[int], Path]
) -> None:
    place = disk(64 * MIB)
    assert train(small_model_folder, photos, place, tmp_path) == 0
    left = used(place)
    disk(left + 26 * MIB)  # 16 MiB for the report, 9 for a checkpoint being written
    assert train(small_model_folder, photos, place, tmp_path) == 0


@pytest.mark.parametrize(
    ("count", "options", "told"),
    [
        (16384, [], "The log of the run cannot be written to "),
        (8192, ["--num_class_images=4"], "The class image"),
        (6 * MIB, [], "The checkpoint of step 1 cannot be written"),
        (2 * MIB, ["--checkpointing_steps=9"], "The model cannot be written to "),
    ],
)
def test_a_disk_that_others_fill_up_costs_one_sentence(
    small_model_folder: Path,
    photos: Path,
    tmp_path: Path,
    disk: Callable[[int], Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    options: list[str],
    told: str,
) -> None:
    place = disk(count)
    monkeypatch.setattr(outputs, "check_room", lambda *_: None)
    assert train(small_model_folder, photos, place, tmp_path, *options) == 1
    (sentence,) = errors(capsys.readouterr().err)
    assert sentence.startswith(f"error: {told}")
    assert (tmp_path / "output" / "failure").read_text() == sentence.removeprefix("error: ")
    names = {path.name for path in place.rglob("*")}
    assert not {name for name in names if name.startswith((".partial", "model_index", "step-"))}


def test_a_disk_that_fills_up_costs_no_checkpoint_and_the_run_resumes_bit_for_bit(
    small_model_folder: Path,
    photos: Path,
    tmp_path: Path,
    disk: Callable[[int], Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = disk(12 * MIB)
    with monkeypatch.context() as patched:
        patched.setattr(outputs, "check_room", lambda *_: None)
        assert train(small_model_folder, photos, place, tmp_path, "--max_steps=3") == 1
    (sentence,) = errors(capsys.readouterr().err)
    assert sentence.startswith("error: The checkpoint of step 2 cannot be written")
    checkpoints = place / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"step-00000001", "class_images"}
    disk(64 * MIB)
    assert train(small_model_folder, photos, place, tmp_path, "--max_steps=3") == 0
    assert "resumed at step 1" in capsys.readouterr().err
    assert train(small_model_folder, photos, tmp_path / "unbroken", tmp_path, "--max_steps=3") == 0
    a, b = (
        load_file(folder / "model" / "unet" / "diffusion_pytorch_model.safetensors")
        for folder in (place, tmp_path / "unbroken")
    )
    assert all(np.array_equal(a[name], b[name]) for name in b)


def test_a_disk_that_is_full_after_training_costs_no_model(
    small_model_folder: Path,
    photos: Path,
    tmp_path: Path,
    disk: Callable[[int], Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only the last checkpoint, row of metrics and picture are still to be written."""
    place = disk(MIB)
    monkeypatch.setattr(outputs, "check_room", lambda *_: None)
    write_row = run_log.RunLog.step

    def step(self: run_log.RunLog, metrics: StepMetrics) -> None:
        write_row(self, metrics)
        if metrics.step == 2:
            raise ResourceError("The output folder cannot be written: No space left on device.")

    monkeypatch.setattr(run_log.RunLog, "step", step)
    options = [f"--model_dir={tmp_path / 'model'}", f"--output_data_dir={tmp_path / 'output'}"]
    options += ["--checkpointing_steps=2", "--sample_steps=1"]
    assert train(small_model_folder, photos, place, tmp_path, *options) == 0
    shown = capsys.readouterr().err
    assert errors(shown) == []
    assert "all steps are made, but not all of their report: The output folder" in shown
    assert "the model is whole, but not what comes after it: The checkpoint of step 2" in shown
    model = tmp_path / "model"
    assert (model / "model_index.json").exists()
    (sample,) = (model / "samples").iterdir()
    assert f"](samples/{sample.name})" in (model / "README.md").read_text("utf-8")
    pictures = sorted((tmp_path / "output" / "samples").iterdir())
    assert [path.name for path in pictures] == ["step-000001.png", "step-000002.png"]
    assert pictures[1].read_bytes() == sample.read_bytes()


@contextmanager
def files_of_at_most(count: int) -> Iterator[None]:
    """Make writing beyond `count` bytes fail as on a full disk; needs no rights."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("count", [500, 50_000])
def test_a_file_that_may_not_grow_is_one_sentence(
    small_model_folder: Path,
    photos: Path,
    tmp_path: Path,
    count: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with files_of_at_most(count):
        code = train(small_model_folder, photos, tmp_path, tmp_path)
    assert code == 1
    (sentence,) = errors(capsys.readouterr().err)
    assert "cannot be written" in sentence
    assert not list(tmp_path.rglob(".partial*"))
    assert train(small_model_folder, photos, tmp_path, tmp_path) == 0
