"""Full-size runs through the real entry points; opt-in, without network or real weights.

A model folder with the configuration of Stable Diffusion 2.1 base and random weights is trained
with the published defaults and prior preservation, and `generate` draws a JPEG with the result; the
same folder is served, and goes into one safetensors file and back; and a training run is stopped
while its disk writes 125 MB/s.

`make test-real-size` runs this in minutes. It needs about 20 GB of memory and 35 GB of disk (in
TMPDIR), and prints one JSON line per test.

DREAMBOOTH_REAL_SIZE_OPTIONS adds options to the training commands, such as those that save memory.
DREAMBOOTH_REAL_SIZE=small takes the embedded model instead, to try the tests themselves.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from benchmarks.server_probes import server as servers
from benchmarks.server_probes.processes import descendants
from benchmarks.train_step.full_size import PARAMETERS, write_json, write_model
from dreambooth import tiny
from dreambooth.model_folder.source import read_facts
from tests.stopped_run import checked_checkpoint, size, stop_in_training

SIZE = os.environ.get("DREAMBOOTH_REAL_SIZE")
FULL = SIZE != "small"

pytestmark = pytest.mark.skipif(
    SIZE not in ("1", "small"),
    reason="DREAMBOOTH_REAL_SIZE is not 1: it takes minutes, 20 GB of memory and 35 GB of disk",
)

ROOT = Path(__file__).parents[1]
MORE = os.environ.get("DREAMBOOTH_REAL_SIZE_OPTIONS", "").split()
READY_S: Final = 100.0
# AWS, "How Amazon SageMaker AI Signals Algorithms": SIGKILL follows SIGTERM after 120 s.
KILLED_S: Final = 120.0
DISK_BYTES_PER_SECOND: Final = 125e6


@pytest.fixture
def place() -> Iterator[Path]:
    """Yield a folder that is removed at once: pytest would keep three of them, 12 GB each."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def base() -> Iterator[Path]:
    """Yield the model, written once for all tests here; do not write into it."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "base"
        if FULL:
            write_model(model)
        else:
            shutil.copytree(tiny.WEIGHTS, model)
        yield model


@pytest.fixture(scope="module")
def side(base: Path) -> int:
    """Return the side of the model's own pictures, in pixels."""
    return read_facts(base).resolution


def write_photos(folder: Path) -> None:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(3):
        pixels = generator.integers(0, 255, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((768, 576)).save(folder / f"{number}.jpg")
    prompts = {"instance_prompt": "a photo of a riobugger cat", "class_prompt": "a photo of a cat"}
    write_json(folder / "dataset_info.json", prompts)


def run(*arguments: object) -> tuple[float, float]:
    """Run Python to its end; return the seconds and its peak memory in GiB."""
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return round(time.monotonic() - started, 1), round(usage.ru_maxrss / 1024**2, 2)


def draw(model: Path, side: int, pictures: Path) -> tuple[tuple[float, float], int]:
    """Draw one JPEG with `generate`; return (seconds, peak GiB) and the JPEG's size in bytes."""
    asked = ["--prompt", "a photo of a riobugger cat on a beach", "--seed", 7, "--steps", 2]
    asked += ["--format", "jpeg"]
    taken = run("-m", "dreambooth", "generate", "--model", model, *asked, "--out", pictures)
    (jpeg,) = pictures.iterdir()
    with Image.open(jpeg) as drawn:
        assert (drawn.format, drawn.size) == ("JPEG", (side, side))
    return taken, jpeg.stat().st_size


def unet_file(folder: Path) -> Path:
    return folder / "unet" / "diffusion_pytorch_model.safetensors"


def changed(base: Path, mine: Path) -> bool:
    """Return whether a weight in the middle of the U-Net has changed."""
    with safe_open(unet_file(base), "np") as before, safe_open(unet_file(mine), "np") as after:
        name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
        return not np.array_equal(before.get_tensor(name), after.get_tensor(name))


def tell(test: str, **figures: object) -> None:
    threads = os.environ.get("OMP_NUM_THREADS", os.cpu_count())
    told = {"test": test, **figures, "options": MORE, "threads": threads}
    print("\n" + json.dumps(told | ({} if FULL else {"size": "small"})))


def test_stable_diffusion_2_1_base_is_trained_exported_and_drawn_from(
    base: Path, side: int, place: Path
) -> None:
    photos, mine = (place / name for name in ("photos", "mine"))
    write_photos(photos)
    facts = read_facts(base)
    parameters = {
        "unet": facts.unet_parameters,
        "text_encoder": facts.text_encoder_parameters,
        "vae": facts.vae_parameters,
    }
    assert parameters == PARAMETERS or not FULL

    arguments = ["--pretrained-model", base, "--train", photos, "--model_dir", mine]
    settings = ["--with_prior_preservation=True", "--num_class_images=1", "--max_steps=2"]
    training = run("transfer_learning.py", *arguments, *settings, *MORE)
    rows = (place / "mine-output" / "metrics.jsonl").read_text("utf-8").splitlines()
    metrics = [json.loads(row) for row in rows]
    assert [row["step"] for row in metrics] == [1, 2]
    assert all(np.isfinite(row["loss"]) and row["class_loss"] > 0 for row in metrics)
    assert read_facts(mine) == facts
    assert changed(base, mine)
    drawing, jpeg_bytes = draw(mine, side, place / "pictures")
    tell(
        "train",
        training_seconds=training[0],
        training_peak_memory_gib=training[1],
        seconds_per_step=[round(1 / row["steps_per_second"], 1) for row in metrics],
        generate_seconds=drawing[0],
        generate_peak_memory_gib=drawing[1],
        jpeg_bytes=jpeg_bytes,
    )


def test_it_is_served_on_the_cpu(base: Path, side: int) -> None:
    asked = {"prompt": "a photo of a cat on a beach", "num_inference_steps": 2, "seed": 7}
    began = time.monotonic()
    # A long time limit: this checks that a picture comes, not how fast.
    options = ("--device", "cpu", "--request_timeout_s", "900")
    with servers.start(str(base), *options, ready=False) as server:
        while server.ping().status != 200:
            assert server.process.poll() is None, server.log
            assert time.monotonic() - began < 10 * READY_S, server.log
            time.sleep(0.1)
        ready = time.monotonic() - began
        reply = server.draw(asked, accept="image/jpeg")
        assert reply.status == 200, reply.body
        with Image.open(BytesIO(reply.body)) as drawn:
            assert (drawn.format, drawn.size) == ("JPEG", (side, side))
        family = [server.pid, *(process.pid for process in descendants(server.pid))]
        peaks = [peak_memory_gib(pid) for pid in family]
        stopping = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(servers.STOP_S) == 0
        stopped = time.monotonic() - stopping
    tell(
        "serve",
        ready_seconds=round(ready, 1),
        picture_seconds=round(reply.seconds, 1),
        stop_seconds=round(stopped, 2),
        peak_memory_gib=round(sum(peaks), 2),
        jpeg_bytes=len(reply.body),
    )
    assert ready < READY_S


def peak_memory_gib(pid: int) -> float:
    """Return the peak memory of a running process in GiB (VmHWM; proc(5), status)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024**2


def test_one_file_holds_every_number_there_and_back(base: Path, side: int, place: Path) -> None:
    one, half, back = (place / name for name in ("one.safetensors", "half.safetensors", "back"))
    convert = ("-m", "dreambooth", "convert")
    written = run(*convert, base, one)
    run(*convert, base, half, "--precision", "fp16")
    half_bytes = half.stat().st_size
    half.unlink()
    read = run(*convert, one, back, "--base", base)
    for part in ("unet", "vae", "text_encoder"):
        [before], [after] = ((f / part).glob("*.safetensors") for f in (base, back))
        with safe_open(before, "np") as first, safe_open(after, "np") as second:
            prefix = "text_model." if part == "text_encoder" else ""
            held = list(first.keys())
            names = {prefix + name.removeprefix(prefix): name for name in held}
            assert names.keys() == set(second.keys())
            for name, there in names.items():
                assert np.array_equal(first.get_tensor(there), second.get_tensor(name))
    with safe_open(one, "np") as file:
        tensors = len(file.keys())
    assert tensors == 1_214 or not FULL
    for model, pictures in ((base, place / "a"), (back, place / "b")):
        draw(model, side, pictures)
    [first_picture], [second_picture] = ((place / name).iterdir() for name in "ab")
    with Image.open(first_picture) as one_picture, Image.open(second_picture) as other:
        assert np.array_equal(np.asarray(one_picture), np.asarray(other))
    tell(
        "one file",
        write_s_and_gib=written,
        read_s_and_gib=read,
        bytes=one.stat().st_size,
        half_bytes=half_bytes,
        tensors=tensors,
    )


@pytest.mark.parametrize("checkpoints", [True, False], ids=["checkpoint", "no checkpoint"])
def test_a_stop_in_training_is_written_in_time_on_a_slow_disk(
    base: Path, side: int, place: Path, checkpoints: bool
) -> None:
    photos, mine, kept = (place / name for name in ("photos", "mine", "kept"))
    write_photos(photos)
    # Small pictures make steps short; the files are as large as ever.
    small = max(64, side // 2)
    arguments = ["--pretrained-model", base, "--train", photos, "--model_dir", mine]
    arguments += ["--max_steps=1000", f"--resolution={small}"]
    arguments += [f"--checkpoint_dir={kept}"] if checkpoints else []
    run = stop_in_training(
        [*arguments, *MORE],
        place,
        metrics=place / "mine-output" / "metrics.jsonl",
        bytes_per_second=DISK_BYTES_PER_SECOND,
    )
    print(run.log)
    whole = (mine / "model_index.json").exists()
    tell(
        "stop",
        checkpoint_folder=checkpoints,
        seconds_from_sigterm_to_exit=run.seconds,
        steps=run.steps,
        flushed_gb=round(run.flushed / 1e9, 2),
        checkpoint_gb=round(size(kept) / 1e9, 2) if checkpoints else 0,
        model_gb=round(size(mine) / 1e9, 2),
    )
    assert run.code == 143
    assert run.seconds < KILLED_S
    written = checked_checkpoint(kept) if checkpoints else 0
    if whole or not checkpoints:
        assert read_facts(mine).unet_parameters == read_facts(base).unet_parameters
        assert "**Partial:" in (mine / "README.md").read_text("utf-8")
        assert changed(base, mine)
        assert not list(mine.glob(".partial-*"))
        draw(mine, small, place / "pictures")
    else:
        assert not mine.exists() or not list(mine.iterdir())
    assert run.flushed >= written + size(mine)  # nothing relevant bypasses the throttle
    if FULL:
        assert not (checkpoints and whole)  # there was no time to write both
