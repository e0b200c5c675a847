"""Write the trained parts as the folder that ships: a diffusers pipeline, its card and recipe.json.

The folder has the ordinary layout of a StableDiffusionPipeline, with weights in half precision. The
text encoder's keys have the `text_model.` prefix of transformers 4, which version 5 reads as well;
without the prefix, version 4 would fill the encoder with random numbers.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tiny_world.text_unet_training import NOISE_SCHEDULE

RECIPE_FILE = "recipe.json"
_CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
tags: [stable-diffusion, text-to-image, tiny, drawn-world]
---
# The embedded model: drawn cats, dogs, chairs and ottomans, 64x64

A StableDiffusionPipeline of {parameters:.1f} million parameters, trained from nothing on pictures
that `tiny_world/world.py` draws: cats and dogs of six coats and four markings, some with a
collar of four colours, some on an ottoman; chairs and ottomans of ten colours and three patterns;
in six settings, as a photo or a pencil sketch. It knows the words of that world and nothing else;
it exists so that the whole job runs in a minute on a CPU. It is no model of real animals and of no
use for real pictures.

Say, for example: "a photo of an orange striped cat with a blue collar on a beach", at guidance 3.5.
Noise prediction under the noise schedule of Stable Diffusion 2.1 base. How it was trained stands in
`recipe.json` and in the docstring of `tiny_world/recipe.py`.
"""


def write(
    folder: Path,
    *,
    vae: Any,
    text_encoder: Any,
    unet: Any,
    scaling_factor: float,
    tokenizer: Path,
    resolution: int,
    report: Mapping[str, Any],
) -> None:
    """Write the pipeline folder anew.

    report: the content of recipe.json, to which the hash of every other file is added.
    """
    import diffusers
    from diffusers import PNDMScheduler

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    vae = copy.deepcopy(vae).half()
    vae.register_to_config(scaling_factor=scaling_factor)
    vae.save_pretrained(folder / "vae")
    copy.deepcopy(unet).half().save_pretrained(folder / "unet")
    _write_text_encoder(folder / "text_encoder", text_encoder)
    PNDMScheduler(**NOISE_SCHEDULE).save_pretrained(folder / "scheduler")
    _settle_scheduler(folder / "scheduler" / "scheduler_config.json")
    shutil.copytree(tokenizer, folder / "tokenizer")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    _write_json(folder / "__model_info__.json", {"resolution": resolution})
    parts = (vae, unet, text_encoder)
    count = sum(parameter.numel() for part in parts for parameter in part.parameters())
    (folder / "README.md").write_text(_CARD.format(parameters=count / 1e6), encoding="utf-8")
    _write_json(folder / "model_index.json", index)
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)
    write_report(folder, report)


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write recipe.json anew, with `report` and the hashes of the files that are in the folder."""
    _write_json(folder / RECIPE_FILE, {**report, "sha256": hashes(folder)})


def add_to_report(folder: Path, figures: Mapping[str, Any]) -> None:
    """Add figures that were measured later to recipe.json."""
    path = folder / RECIPE_FILE
    _write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **figures})


def hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of the pipeline except recipe.json, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.name != RECIPE_FILE
    }


def _write_text_encoder(folder: Path, text_encoder: Any) -> None:
    from safetensors.torch import save_file

    prefix = "text_model."
    text_encoder.config.save_pretrained(folder)
    path = folder / "config.json"
    configuration = json.loads(path.read_text(encoding="utf-8"))
    # transformers would load the encoder in the precision named here, unlike the U-Net.
    configuration |= {"architectures": ["CLIPTextModel"], "torch_dtype": "float32"}
    configuration.pop("dtype", None)
    _write_json(path, configuration)
    tensors = {
        (name if name.startswith(prefix) else prefix + name): tensor.detach().half().contiguous()
        for name, tensor in text_encoder.state_dict().items()
        if not name.endswith("position_ids")
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _settle_scheduler(path: Path) -> None:
    settings = json.loads(path.read_text(encoding="utf-8"))
    _write_json(path, {**settings, "clip_sample": False, "trained_betas": None})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
