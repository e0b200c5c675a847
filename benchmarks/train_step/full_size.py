"""Write a model folder with the configuration of Stable Diffusion 2.1 base and random weights.

Speed and memory do not depend on the weights' values. Source of the configuration: the JSON files
of the published folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dreambooth.model_folder.facts import ModelFacts

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
# From the headers of the published weights.
PARAMETERS = {"unet": 865_910_724, "text_encoder": 340_387_840, "vae": 83_653_863}
# What training plans are derived from.
FACTS = ModelFacts(
    prediction_type="epsilon",
    resolution=SIDE,
    latent_channels=4,
    vae_scale_factor=8,
    unet_layer_elements=5 * (320 * 64**2 + 640 * 32**2 + 1280 * 16**2 + 1280 * 8**2),
    unet_parameters=PARAMETERS["unet"],
    text_encoder_parameters=PARAMETERS["text_encoder"],
    vae_parameters=PARAMETERS["vae"],
)


def write_model(folder: Path) -> None:
    """Write the folder (5.2 GB), part by part to save memory."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    UNet2DConditionModel(**UNET).save_pretrained(folder / "unet")
    AutoencoderKL(**VAE).save_pretrained(folder / "vae")
    CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER)).save_pretrained(folder / "text_encoder")
    _write_tokenizer(folder / "tokenizer")
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


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write one JSON object; create the folder if necessary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def _write_tokenizer(folder: Path) -> None:
    """Write a byte-level vocabulary as large as CLIP's, whose merges are pairs of characters."""
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
