"""Jobs that run beside SageMaker's agent, which puts marker files beside every checkpoint file.

Seen on the platform: `FILE.sagemaker-uploading` while a file is sent to S3, then
`FILE.sagemaker-uploaded`, also in hidden folders; the marker goes when FILE is removed.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreambooth.job import class_sampling, previews
from dreambooth.job.run import run_job

UPLOADING, UPLOADED = ".sagemaker-uploading", ".sagemaker-uploaded"
KILLS = 20
STEPS = 80


@contextlib.contextmanager
def agent(folder: Path) -> Iterator[list[int]]:
    """Mark the files below `folder` until the block ends; yield a list with the number of marks."""
    ended, marked = threading.Event(), [0]

    def watch() -> None:
        while not ended.is_set():
            marked[0] += _mark(folder)
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield marked
    finally:
        ended.set()
        thread.join()


def _mark(folder: Path) -> int:
    made = 0
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            with contextlib.suppress(OSError):  # the job removes files at the same time
                if name.endswith(UPLOADING):
                    path.rename(path.with_suffix(UPLOADED))
                elif name.endswith(UPLOADED):
                    if not path.with_suffix("").exists():
                        path.unlink()
                elif not Path(f"{path}{UPLOADED}").exists():
                    Path(f"{path}{UPLOADING}").touch()
                    made += 1
    return made


def write_photos(folder: Path) -> Path:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(3):
        pixels = generator.integers(0, 255, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    prompts = {"instance_prompt": "a photo of riobugger cat", "class_prompt": "a photo of cat"}
    (folder / "dataset_info.json").write_text(json.dumps(prompts))
    return folder


def arguments(model: Path, photos: Path, out: Path, *more: str) -> list[str]:
    argv = [f"--pretrained-model={model}", f"--train={photos}", f"--model_dir={out}"]
    argv += [f"--max_steps={STEPS}", "--with_prior_preservation", "--num_class_images=2"]
    return [*argv, *more]


def weights(model: Path) -> bytes:
    return (model / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


def newest_step(checkpoints: Path) -> int:
    return max((int(path.name[len("step-") :]) for path in checkpoints.glob("step-*")), default=0)


def run(argv: list[str]) -> None:
    """Run the job in a process of its own that exits with the job's exit code."""
    class_sampling.NUM_INFERENCE_STEPS = previews.NUM_INFERENCE_STEPS = 2
    os._exit(run_job(argv, {}))


def test_a_job_that_is_killed_beside_the_agent_goes_on_to_the_same_bits(
    small_model_folder: Path, tmp_path: Path
) -> None:
    photos, checkpoints = write_photos(tmp_path / "photos"), tmp_path / "checkpoints"
    unbroken = arguments(small_model_folder, photos, tmp_path / "unbroken")
    killed = arguments(
        *(small_model_folder, photos, tmp_path / "killed"),
        *(f"--checkpoint_dir={checkpoints}", "--checkpointing_steps=1"),
    )
    context = multiprocessing.get_context("forkserver")  # this imports the libraries only once
    context.set_forkserver_preload(["dreambooth.job.fine_tune", "dreambooth.training.adamw_8bit"])
    process = context.Process(target=run, args=(unbroken,))
    process.start()
    process.join()
    assert process.exitcode == 0
    moments = random.Random(0)
    with agent(checkpoints) as marked:
        for _ in range(KILLS):
            before = newest_step(checkpoints)
            process = context.Process(target=run, args=(killed,))
            process.start()
            while newest_step(checkpoints) <= before:
                assert process.exitcode is None, "the job ended by itself"
                time.sleep(0.002)
            time.sleep(moments.uniform(0.0, 0.05))
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            assert process.exitcode == -signal.SIGKILL
        process = context.Process(target=run, args=(killed,))
        process.start()
        process.join()
        assert process.exitcode == 0
    assert marked[0] > KILLS
    assert weights(tmp_path / "killed") == weights(tmp_path / "unbroken")
    manifest = json.loads((checkpoints / f"step-{STEPS:08d}" / "manifest.json").read_text())
    assert sorted(manifest["files"]) == ["optimizer.pt", "unet.safetensors"]


def test_a_model_folder_beside_the_checkpoints_is_replaced_beside_the_agent(
    small_model_folder: Path, tmp_path: Path
) -> None:
    photos, out = write_photos(tmp_path / "photos"), tmp_path / "c" / "model"
    more = (f"--checkpoint_dir={tmp_path / 'c'}", "--max_steps=1", "--resume=fresh")
    argv = arguments(small_model_folder, photos, out, *more)
    with agent(tmp_path / "c") as marked:
        for _ in range(3):
            assert run_job(argv, {}) == 0
    assert marked[0] > 3


@pytest.mark.parametrize("marker", [UPLOADING, UPLOADED])
def test_a_checkpoint_whose_manifest_lists_markers_is_resumed(
    small_model_folder: Path,
    tmp_path: Path,
    marker: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The first version of this project wrote such manifests."""
    photos, checkpoints = write_photos(tmp_path / "photos"), tmp_path / "checkpoints"
    more = (f"--checkpoint_dir={checkpoints}", "--checkpointing_steps=1")
    argv = arguments(small_model_folder, photos, tmp_path / "model", *more, "--max_steps=2")
    assert run_job(argv, {}) == 0
    first = weights(tmp_path / "model")
    path = checkpoints / "step-00000002" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][f"unet.safetensors{marker}"] = "0" * 64
    path.write_text(json.dumps(manifest))
    assert run_job(argv, {}) == 0
    assert "resumed at step 2" in capsys.readouterr().err
    assert weights(tmp_path / "model") == first
