"""Checks the folder of a vision model for compute_fid before anything is loaded.

Standard library only. The folder is only data, in transformers' layout and with safetensors only:
we choose the classes, and nothing in it names code that we would import or download.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dreambooth.errors import ModelArtifactError, one_line, quoted
from dreambooth.model_folder import configuration, headers, layout
from dreambooth.process import addresses

CLIP = ("clip", "clip_vision_model")
KINDS = (*CLIP, "dinov2", "vit")

# The default of all these configurations, in pixels.
_IMAGE_SIZE = 224
# The normalization of OpenAI's CLIP, also used by most later vision models; a folder's own values
# take precedence.
_MEAN, _STD = (0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)
# Bounds: _MOST of a mean or std (up to 255 where pixels are not 0..1), _LEAST of a std.
_MOST, _LEAST = 1e4, 1e-4
# Settings that would make the library load weights in another float type than the file's.
_FLOAT_TYPES = ("dtype", "torch_dtype")


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionModel:
    """A checked folder. kind: one of KINDS. config: the settings of the vision part.

    setting: the one that named the folder, for messages.

    The network takes RGB 0..1 of `height` x `width` pixels, minus `mean`, divided by `std`.
    """

    folder: Path
    kind: str
    config: dict[str, Any]
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    setting: str = "fid_features"


def read(given: Path | str, *, setting: str = "fid_features") -> VisionModel:
    """Read the configurations and weight headers of the folder that a setting names.

    Raises ModelArtifactError, in one sentence that names the setting and the file, and UserError
    for an address.
    """
    folder = addresses.to_path(str(given), setting)
    try:
        return replace(_read(folder), setting=setting)
    except (ModelArtifactError, OSError) as error:
        raise ModelArtifactError(f"{setting}: {error}") from error


def _read(folder: Path) -> VisionModel:
    if not folder.is_dir():
        raise ModelArtifactError(
            f"There is no folder {folder}; one of a CLIP, DINOv2 or ViT model in transformers' "
            "layout (config.json, model.safetensors) is expected."
        )
    path, settings_path = folder / "config.json", folder / "preprocessor_config.json"
    layout.refuse_foreign_files(folder, sorted(folder.iterdir()))
    config = configuration.checked(path, layout.read_json(path), "vision_model")
    kind = config.get("model_type")
    if kind not in KINDS:
        raise ModelArtifactError(
            f"{path} is of the type {quoted(kind)}; a folder of one of "
            f"{', '.join(KINDS)} in transformers' layout is expected."
        )
    chosen, files = layout.weight_files(folder)
    if chosen.pickled:
        raise ModelArtifactError(f"{folder / chosen.name} is a pickle; safetensors are expected.")
    for weights in files:
        headers.read_header(weights)
    vision = _vision_settings(path, config) if kind == "clip" else config
    height, width = _image_size(path, vision)
    if kind in CLIP and height != width:
        raise ModelArtifactError(f"{path} asks for {width} x {height} pixels; CLIP's are square.")
    if (channels := vision.get("num_channels", 3)) != 3:
        raise ModelArtifactError(f"{path} asks for {_shown(channels)} channels, not RGB's three.")
    vision["image_size"] = height if height == width else [height, width]
    settings = layout.read_json(settings_path) if settings_path.is_file() else {}
    return VisionModel(
        folder=folder,
        kind=kind,
        config={k: v for k, v in vision.items() if k.lstrip("_") not in _FLOAT_TYPES},
        height=height,
        width=width,
        mean=_three_numbers(settings_path, "image_mean", settings.get("image_mean", _MEAN)),
        std=_three_numbers(settings_path, "image_std", settings.get("image_std", _STD)),
    )


def _vision_settings(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return the vision settings of a whole CLIP model."""
    vision = config.get("vision_config")
    if not isinstance(vision, dict):
        raise ModelArtifactError(
            f"{path} gives vision_config as {_shown(vision)}; "
            "the settings of CLIP's vision model are expected."
        )
    # The whole model's embeddings have one width, whatever its parts say of themselves.
    return {**vision, **{k: v for k, v in config.items() if k == "projection_dim"}}


def _image_size(path: Path, config: dict[str, Any]) -> tuple[int, int]:
    """Return (height, width); a configuration may give one side or both."""
    given = config.get("image_size", _IMAGE_SIZE)
    sides = given if isinstance(given, list) else [given, given]
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise ModelArtifactError(
            f"{path} gives image_size as {_shown(given)}; "
            "the side in pixels, or height and width, are expected."
        )
    return sides[0], sides[1]


def _three_numbers(path: Path, name: str, given: Any) -> tuple[float, ...]:
    positive = name == "image_std"
    least = _LEAST if positive else -_MOST
    fits = isinstance(given, (list, tuple)) and len(given) == 3
    if not fits or not all(type(n) in (int, float) and least <= n <= _MOST for n in given):
        raise ModelArtifactError(
            f"{path} gives {name} as {_shown(given)}; "
            f"three {'positive ' * positive}numbers are expected."
        )
    return tuple(map(float, given))


def _shown(given: object) -> str:
    return one_line(json.dumps(given), 80)
