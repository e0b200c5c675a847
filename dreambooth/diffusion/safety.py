"""The model folder's safety checker: StableDiffusionSafetyChecker with CLIP's preprocessing.

As everywhere, the folder is untrusted data: our code chooses the class, weights are matched by
name, and pictures are prepared here, with Pillow and the numbers of preprocessor_config.json.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPConfig

from dreambooth.diffusion.trial import faults_of
from dreambooth.errors import ModelArtifactError, quoted
from dreambooth.limits import LIMITS, Limits
from dreambooth.model_folder import layout, weights
from dreambooth.model_folder.component_classes import COMPONENTS

logger = logging.getLogger(__name__)

# CLIP's own numbers, used where a preprocessor_config.json leaves them out.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_SIDE = 224
_MOST_SIDE = 2048
_FEATURE_CLASSES = frozenset(name for _, name in COMPONENTS["feature_extractor"])


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipInput:
    """The preprocessing that a preprocessor_config.json asks for.

    shortest_edge: pixels after resizing; None: not resized. crop: (height, width) in pixels; None:
    not cropped. rescale: factor on 0..255. mean, std: of the three colours after rescaling; (0, 0,
    0) and (1, 1, 1) without normalisation.
    """

    shortest_edge: int | None = _SIDE
    crop: tuple[int, int] | None = (_SIDE, _SIDE)
    resample: int = Image.Resampling.BICUBIC
    rescale: float = 1 / 255
    mean: tuple[float, ...] = _MEAN
    std: tuple[float, ...] = _STD

    def prepare(self, pixels: np.ndarray) -> torch.Tensor:
        """Turn a picture uint8 [H, W, 3], 0..255, into CLIP's input, float32 [1, 3, h, w]."""
        image = Image.fromarray(pixels)
        if self.shortest_edge is not None:
            short, long = sorted(image.size)
            other = int(self.shortest_edge * long / short)
            tall = image.height > image.width
            size = (self.shortest_edge, other) if tall else (other, self.shortest_edge)
            image = image.resize(size, Image.Resampling(self.resample))
        if self.crop is not None:
            height, width = self.crop
            # A crop that exceeds the picture is filled with black, by Pillow as by CLIP.
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        values = np.asarray(image, dtype=np.float32) * np.float32(self.rescale)
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
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
        clip_input = self._clip_input.prepare(pixels).to(weight.device, weight.dtype)
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

    Raises ModelArtifactError for an incomplete or malformed one: a checker that the model asks for
    must not be skipped.
    """
    index = layout.read_index(folder, limits=limits)
    if not _named(index, "safety_checker"):
        return None
    config = layout.component_config(folder, "safety_checker", limits=limits)
    network = _build(config, folder / "safety_checker" / "config.json")
    weights.load_into(
        network,
        folder / "safety_checker",
        device=device,
        dtype=dtype,
        rename=_renamer(network),
        limits=limits,
    )
    network.requires_grad_(False).eval().to(device)
    clip_input = ClipInput()
    if _named(index, "feature_extractor"):
        clip_input = read_clip_input(folder / "feature_extractor", limits=limits)
    side = network.config.vision_config.image_size
    if clip_input.crop != (side, side):
        raise ModelArtifactError(
            f"{folder / 'feature_extractor'} makes pictures of {clip_input.crop}, where the safety "
            f"checker sees {side} x {side} pixels."
        )
    checker = SafetyChecker(network, clip_input)
    with faults_of(folder / "safety_checker" / "config.json", "safety checker that sees pictures"):
        checker.hides(np.full((_SIDE, _SIDE, 3), 127, dtype=np.uint8))
    return checker


def read_clip_input(folder: Path, *, limits: Limits = LIMITS) -> ClipInput:
    """Read a feature extractor's preprocessor_config.json, in its old or its new format."""
    path = folder / "preprocessor_config.json"
    config = layout.read_json(path, limits=limits)
    for key in ("feature_extractor_type", "image_processor_type"):
        name = config.get(key)
        if name is not None and (not isinstance(name, str) or name not in _FEATURE_CLASSES):
            raise ModelArtifactError(f"{path} is of the class {quoted(name)}, not CLIP's.")
    try:
        return _clip_input(config)
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise ModelArtifactError(
            f"{path} does not say how to prepare a picture for CLIP: {error}."
        ) from error


def _clip_input(config: Mapping[str, Any]) -> ClipInput:
    size, crop = config.get("size", _SIDE), config.get("crop_size", _SIDE)
    normalizes = config.get("do_normalize", True)
    if isinstance(size, dict) and len(size) > 1:
        raise ValueError(f"a size of {quoted(size)}")
    for name in ("default_to_square", "use_square_size", "do_pad"):
        if config.get(name):
            raise ValueError(f"{name} = {quoted(config[name])}")
    return ClipInput(
        shortest_edge=_side(size["shortest_edge"] if isinstance(size, dict) else size)
        if config.get("do_resize", True)
        else None,
        crop=_sides(crop) if config.get("do_center_crop", True) else None,
        resample=int(Image.Resampling(config.get("resample", Image.Resampling.BICUBIC))),
        rescale=_number(config.get("rescale_factor", 1 / 255))
        if config.get("do_rescale", True)
        else 1.0,
        mean=_three(config.get("image_mean", _MEAN)) if normalizes else (0.0, 0.0, 0.0),
        std=_positive(_three(config.get("image_std", _STD))) if normalizes else (1.0, 1.0, 1.0),
    )


def _sides(crop: object) -> tuple[int, int]:
    if isinstance(crop, dict):
        return _side(crop["height"]), _side(crop["width"])
    return _side(crop), _side(crop)


def _side(value: object) -> int:
    if type(value) is not int or not 1 <= value <= _MOST_SIDE:
        raise ValueError(f"a side of {quoted(value)} pixels")
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{quoted(value)} where a number is needed")
    return float(value)


def _three(values: object) -> tuple[float, ...]:
    if not isinstance(values, (list, tuple)) or len(values) != 3:
        raise ValueError(f"{quoted(values)} where three numbers are needed")
    return tuple(_number(value) for value in values)


def _positive(values: tuple[float, ...]) -> tuple[float, ...]:
    if min(values) <= 0:
        raise ValueError(f"{values} where positive numbers are needed")
    return values


def _named(index: Mapping[str, Any], part: str) -> bool:
    entry = index.get(part)
    return isinstance(entry, list) and entry != [None, None] and bool(entry)


def _build(config: dict[str, Any], path: Path) -> Any:
    empty_weights = init_empty_weights(include_buffers=False)
    with faults_of(path, "safety checker that can be built"), empty_weights:
        return StableDiffusionSafetyChecker(CLIPConfig.from_dict(config))


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
