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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from dreambooth.diffusion.source import read_facts

pytestmark = pytest.mark.skipif(
    os.environ.get("DREAMBOOTH_REAL_SIZE") != "1",
    reason="DREAMBOOTH_REAL_SIZE is not 1: it takes minutes, 20 GB of memory and 12 GB of disk",
)

ROOT = Path(__file__).parents[1]
TOKENS, WIDTH, ENTRIES = 77, 1024, 49_408
SIDE = 512  # pixels
UNET = {
    "sample_size": SIDE // 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": WIDTH,
    "use_linear_projection": True,
}
VAE = {
    "sample_size": 768,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
TEXT_ENCODER = {
    "vocab_size": ENTRIES,
    "hidden_size": WIDTH,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "max_position_embeddings": TOKENS,
    "hidden_act": "gelu",
    "projection_dim": 512,
    "bos_token_id": ENTRIES - 2,
    "eos_token_id": ENTRIES - 1,
    "pad_token_id": 0,
}
NOISE_SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
# What stands in the headers of the published weights.
PARAMETERS = {"unet": 865_910_724, "text_encoder": 340_387_840, "vae": 83_653_863}


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that goes at once: pytest would keep three of them, 12 GB each."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_tokenizer(folder: Path) -> None:
    """A byte-level vocabulary as large as CLIP's; its merges are pairs of letters."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in printable]
    letters += [chr(256 + number) for number in range(256 - len(printable))]
    tokens = letters + [letter + "</w>" for letter in letters]
    pairs = [(first, second) for first in letters for second in tokens]
    pairs = pairs[: ENTRIES - len(tokens) - 2]
    vocabulary = [*tokens, *(a + b for a, b in pairs), "<|startoftext|>", "<|endoftext|>"]
    write_json(folder / "vocab.json", {token: number for number, token in enumerate(vocabulary)})
    rows = ["#version: 0.2", *(" ".join(pair) for pair in pairs)]
    (folder / "merges.txt").write_text("\n".join(rows) + "\n", encoding="utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "!"}
    special["unk_token"] = "<|endoftext|>"
    write_json(folder / "special_tokens_map.json", special)
    settings = {**special, "model_max_length": TOKENS, "tokenizer_class": "CLIPTokenizer"}
    write_json(folder / "tokenizer_config.json", settings)


def write_model(folder: Path) -> None:
    """Stable Diffusion 2.1 base with random weights, part by part to save memory."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    UNet2DConditionModel(**UNET).save_pretrained(folder / "unet")
    AutoencoderKL(**VAE).save_pretrained(folder / "vae")
    CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER)).save_pretrained(folder / "text_encoder")
    write_tokenizer(folder / "tokenizer")
    write_json(folder / "scheduler" / "scheduler_config.json", NOISE_SCHEDULER)
    index = {
        "_class_name": "StableDiffusionPipeline",
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_json(folder / "model_index.json", index)


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
