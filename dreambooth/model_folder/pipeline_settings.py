"""Reads settings as StableDiffusionPipeline does, and refuses those that it draws differently.

Facts of diffusers 0.42 (configuration_utils, pipelines/stable_diffusion) and of transformers 5.
Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dreambooth.errors import ModelArtifactError, quoted

# The settings by which a U-Net takes more than noise, time and text, with the values that do not.
_UNET_INPUTS: Mapping[str, tuple[object, ...]] = {
    "time_cond_proj_dim": (None,),  # guidance as an input: latent consistency models
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "class_embeddings_concat": (None, False),
    "addition_embed_type": (None, "text"),
    "encoder_hid_dim_type": (None, "text_proj"),
}
# The versions before 0.9.0.dev0, as packaging.version reads them.
_BEFORE_0_9 = re.compile(r"\s*v?(?:0+!)?0+(?:\.0*[0-8](?![\d!])|(?!\.?\d|!))", re.IGNORECASE)


def corrected(config: Mapping[str, Any], part: str) -> dict[str, Any]:
    """Return a configuration with the values that StableDiffusionPipeline uses.

    Settings that `_use_default_values` names count as not given. Folders of 2022 state other values
    than they were used with, which the pipeline's constructor corrects: steps_offset becomes 1 and
    clip_sample False (DDIM and DDPM clip by default), and a sample_size below 64 becomes 64 in a
    U-Net written before diffusers 0.9.
    """
    unused = config.get("_use_default_values")
    if part in ("unet", "vae", "scheduler") and isinstance(unused, (list, dict, str)):
        config = {
            key: value
            for key, value in config.items()
            if key not in unused and key != "_use_default_values"
        }
    changes: dict[str, Any] = {}
    if part == "scheduler":
        changes["steps_offset"] = 1
        if config.get("clip_sample", True) is True:
            changes["clip_sample"] = False
    size, version = config.get("sample_size"), str(config.get("_diffusers_version", ""))
    if part == "unet" and type(size) is int and size < 64 and _BEFORE_0_9.match(version):
        changes["sample_size"] = 64
    return {**config, **changes}


def refuse_undrawable(config: Mapping[str, Any], part: str, path: Path) -> None:
    """Raise ModelArtifactError for a part that other pictures than text to image need.

    config: as `corrected` returns it. path: its file, which the message names.
    """
    if part == "unet":
        for name, plain in _UNET_INPUTS.items():
            if config.get(name) not in plain:
                raise ModelArtifactError(
                    f"{path} says {name} = {quoted(config[name])}: this U-Net wants more than "
                    "noise, time and text; only text-to-image models can be used."
                )
        taken, returned = config.get("in_channels", 4), config.get("out_channels", 4)
        if taken != returned:
            raise ModelArtifactError(
                f"{path} says in_channels = {quoted(taken)} and out_channels = "
                f"{quoted(returned)}; only text-to-image models can be used, which have as many "
                "of both."
            )
    if part == "vae":
        for name in ("in_channels", "out_channels"):
            if config.get(name, 3) != 3:
                raise ModelArtifactError(
                    f"{path} says {name} = {quoted(config[name])}: pictures have 3 channels, red, "
                    "green and blue."
                )
    if part == "scheduler" and str(config.get("variance_type")).startswith("learned"):
        raise ModelArtifactError(
            f"{path} says variance_type = {quoted(config['variance_type'])}: it wants a U-Net that "
            "predicts the variance too, which none of Stable Diffusion does; fixed_small is the "
            "usual value."
        )
    if part == "text_encoder" and config.get("text_config") is not None:
        raise ModelArtifactError(
            f"{path} holds a second configuration, text_config, which the libraries would read in "
            "its place: give that one alone."
        )
