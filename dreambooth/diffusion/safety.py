"""The model folder's safety checker: StableDiffusionSafetyChecker with CLIP's preprocessing.

As everywhere, the folder is untrusted data: our code chooses the class, weights are matched by
name, and pictures are prepared here, with Pillow and the numbers of preprocessor_config.json.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPConfig

from dreambooth.diffusion import trial
from dreambooth.errors import ModelArtifactError
from dreambooth.limits import LIMITS, Limits
from dreambooth.model_folder import feature_extractor, layout, weights
from dreambooth.model_folder.feature_extractor import ClipInput

logger = logging.getLogger(__name__)

_SIDE = 224  # of the grey picture that a new checker is tried with


def prepare(pixels: np.ndarray, how: ClipInput) -> torch.Tensor:
    """Turn a picture uint8 [H, W, 3], 0..255, into CLIP's input, float32 [1, 3, h, w]."""
    image = Image.fromarray(pixels)
    if how.shortest_edge is not None:
        short, long = sorted(image.size)
        other = int(how.shortest_edge * long / short)
        tall = image.height > image.width
        size = (how.shortest_edge, other) if tall else (other, how.shortest_edge)
        image = image.resize(size, Image.Resampling(how.resample))
    if how.crop is not None:
        height, width = how.crop
        # A crop that exceeds the picture is filled with black, by Pillow as by CLIP.
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    values = np.asarray(image, dtype=np.float32) * np.float32(how.rescale)
    mean, std = np.array(how.mean, np.float32), np.array(how.std, np.float32)
    values = (values - mean) / std
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))[None]


class SafetyChecker:
    """Decides whether a picture must be hidden."""

    def __init__(self, network: Any, clip_input: ClipInput) -> None:
        """Take a StableDiffusionSafetyChecker in eval mode, on the device where it runs."""
        self._network = network
        self._clip_input = clip_input
        self._seen: torch.Tensor | None = None  # the network's embedding of the last picture
        network.visual_projection.register_forward_hook(self._see)

    def _see(self, _: object, __: object, embedding: torch.Tensor) -> None:
        self._seen = embedding

    @torch.no_grad()
    def hides(self, pixels: np.ndarray) -> bool:
        """Return whether the checker finds one of its concepts in a picture, uint8 [H, W, 3].

        A picture whose embedding is not finite is hidden, because the answer then means nothing.
        """
        weight = self._network.visual_projection.weight
        clip_input = prepare(pixels, self._clip_input).to(weight.device, weight.dtype)
        blanked = [np.zeros(1)]  # a dummy: the network blacks out the pictures it is given
        found = bool(self._network(clip_input=clip_input, images=blanked)[1][0])
        if self._seen is None or not bool(torch.isfinite(self._seen).all()):
            logger.warning("The safety checker's numbers are not finite: the picture is hidden.")
            return True
        return found


def load(
    folder: Path, *, device: torch.device, dtype: torch.dtype, limits: Limits = LIMITS
) -> SafetyChecker | None:
    """Load a model folder's safety checker; return None if its model_index.json names none.

    Raises ModelArtifactError for an incomplete or malformed one.
    """
    clip_input = feature_extractor.of_checker(folder, limits=limits)
    if clip_input is None:
        return None
    settings = layout.component_config(folder, "safety_checker", limits=limits)
    config = folder / "safety_checker" / "config.json"
    network = trial.build(_untrained, settings, config)
    weights.load_into(
        network,
        folder / "safety_checker",
        device=device,
        dtype=dtype,
        rename=_renamer(network),
        limits=limits,
    )
    network.requires_grad_(False).eval().to(device)
    side = network.config.vision_config.image_size
    if clip_input.crop != (side, side):
        raise ModelArtifactError(
            f"{folder / 'feature_extractor'} makes pictures of {clip_input.crop}, where the safety "
            f"checker sees {side} x {side} pixels."
        )
    checker = SafetyChecker(network, clip_input)
    with trial.faults_of(config, "safety checker that sees pictures"):
        checker.hides(np.full((_SIDE, _SIDE, 3), 127, dtype=np.uint8))
    return checker


def _untrained(settings: dict[str, Any]) -> Any:
    return StableDiffusionSafetyChecker(CLIPConfig.from_dict(settings))


def _renamer(network: Any) -> Any:
    # transformers 4.x keeps the vision network under `vision_model.vision_model.`, 5.x does not.
    inner, outer = "vision_model.vision_model.", "vision_model."
    nested = any(key.startswith(inner) for key in network.state_dict())

    def rename(key: str) -> str:
        bare = key.removeprefix(inner).removeprefix(outer)
        if bare == key:
            return key
        return (inner if nested else outer) + bare

    return rename
