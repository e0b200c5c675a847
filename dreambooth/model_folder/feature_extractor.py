"""Reads how a safety checker's pictures are prepared: preprocessor_config.json (no torch)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth.errors import ModelArtifactError, quoted
from dreambooth.limits import LIMITS, Limits
from dreambooth.model_folder import layout
from dreambooth.model_folder.component_classes import COMPONENTS

# CLIP's own numbers, used where a preprocessor_config.json leaves them out.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_SIDE = 224
_MOST_SIDE = 2048
_FEATURE_CLASSES = frozenset(name for _, name in COMPONENTS["feature_extractor"])
# Pillow's numbers of its filters (PIL.Image.Resampling).
_FILTERS = range(6)
_BICUBIC = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipInput:
    """The preprocessing that a preprocessor_config.json asks for.

    shortest_edge: pixels after resizing; None: not resized. crop: (height, width) in pixels; None:
    not cropped. resample: Pillow's number of the filter. rescale: factor on 0..255. mean, std: of
    the three colours after rescaling; (0, 0, 0) and (1, 1, 1) without normalisation.
    """

    shortest_edge: int | None = _SIDE
    crop: tuple[int, int] | None = (_SIDE, _SIDE)
    resample: int = _BICUBIC
    rescale: float = 1 / 255
    mean: tuple[float, ...] = _MEAN
    std: tuple[float, ...] = _STD


def of_checker(folder: Path, *, limits: Limits = LIMITS) -> ClipInput | None:
    """Return how a model folder's safety checker takes pictures; None where it names no checker.

    Without a feature extractor they are CLIP's own numbers. Raises ModelArtifactError where the
    checker's configuration or the extractor's is missing or faulty: a checker that the model asks
    for must not be skipped.
    """
    index = layout.read_index(folder, limits=limits)
    if not layout.names_part(index, "safety_checker"):
        return None
    layout.component_config(folder, "safety_checker", limits=limits)
    if not layout.names_part(index, "feature_extractor"):
        return ClipInput()
    return read(folder / "feature_extractor", limits=limits)


def read(folder: Path, *, limits: Limits = LIMITS) -> ClipInput:
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
        resample=_filter(config.get("resample", _BICUBIC)),
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


def _filter(value: object) -> int:
    if type(value) is not int or value not in _FILTERS:
        raise ValueError(f"the filter {quoted(value)}")
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
