"""The real size through the real entry points: opt-in, minutes, no network and no real weights.

A folder of the configuration of Stable Diffusion 2.1 base with random weights -> training with the
published defaults and prior preservation -> `generate` -> a JPEG. `make test-real-size` runs it; it
needs about 20 GB of memory and 12 GB of disk (TMPDIR says where), and prints one JSON line.
DREAMBOOTH_REAL_SIZE_OPTIONS adds options to the training command, such as those that save memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from dreambooth.benchmarks.train_step.full_size import PARAMETERS, SIDE, write_json, write_model
from dreambooth.diffusion.source import read_facts

pytestmark = pytest.mark.skipif(
    os.environ.get("DREAMBOOTH_REAL_SIZE") != "1",
    reason="DREAMBOOTH_REAL_SIZE is not 1: it takes minutes, 20 GB of memory and 12 GB of disk",
)

ROOT = Path(__file__).parents[1]


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that goes at once: pytest would keep three of them, 12 GB each."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def write_photos(folder: Path) -> None:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(3):
        pixels = generator.integers(0, 255, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((768, 576)).save(folder / f"{number}.jpg")
    prompts = {"instance_prompt": "a photo of a riobugger cat", "class_prompt": "a photo of a cat"}
    write_json(folder / "dataset_info.json", prompts)


def run(*arguments: object) -> tuple[float, float]:
    """Run Python to its end; return seconds and the most memory it held, in GiB."""
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return round(time.monotonic() - started, 1), round(usage.ru_maxrss / 1024**2, 2)


def unet_file(folder: Path) -> Path:
    return folder / "unet" / "diffusion_pytorch_model.safetensors"


def test_stable_diffusion_2_1_base_is_trained_exported_and_drawn_from(place: Path) -> None:
    base, photos, mine, pictures = (place / name for name in ("base", "photos", "mine", "pictures"))
    write_model(base)
    write_photos(photos)
    facts = read_facts(base)
    assert {
        "unet": facts.unet_parameters,
        "text_encoder": facts.text_encoder_parameters,
        "vae": facts.vae_parameters,
    } == PARAMETERS

    arguments = ["--pretrained-model", base, "--train", photos, "--model_dir", mine]
    settings = ["--with_prior_preservation=True", "--num_class_images=1", "--max_steps=2"]
    more = os.environ.get("DREAMBOOTH_REAL_SIZE_OPTIONS", "").split()
    training = run("transfer_learning.py", *arguments, *settings, *more)
    rows = (place / "mine-output" / "metrics.jsonl").read_text("utf-8").splitlines()
    metrics = [json.loads(row) for row in rows]
    assert [row["step"] for row in metrics] == [1, 2]
    assert all(np.isfinite(row["loss"]) and row["class_loss"] > 0 for row in metrics)
    assert read_facts(mine) == facts
    with safe_open(unet_file(base), "np") as before, safe_open(unet_file(mine), "np") as after:
        name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
        assert not np.array_equal(before.get_tensor(name), after.get_tensor(name))

    asked = ["--prompt", "a photo of a riobugger cat on a beach", "--seed", 7, "--steps", 2]
    asked += ["--format", "jpeg"]
    drawing = run("-m", "dreambooth", "generate", "--model", mine, *asked, "--out", pictures)
    (jpeg,) = pictures.iterdir()
    with Image.open(jpeg) as drawn:
        assert (drawn.format, drawn.size) == ("JPEG", (SIDE, SIDE))

    figures = {
        "training_seconds": training[0],
        "training_peak_memory_gib": training[1],
        "seconds_per_step": [round(1 / row["steps_per_second"], 1) for row in metrics],
        "generate_seconds": drawing[0],
        "generate_peak_memory_gib": drawing[1],
        "jpeg_bytes": jpeg.stat().st_size,
        "options": more,
        "threads": os.environ.get("OMP_NUM_THREADS", os.cpu_count()),
    }
    print("\n" + json.dumps(figures))
