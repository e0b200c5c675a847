"""Checks a configuration before anything is built from it (standard library only).

A configuration comes from strangers. What would make a library run code is refused or left out,
sizes are capped before they take memory or hours, and values that would fail only when a picture is
drawn are refused here, so that a dry run names them too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dreambooth.errors import ModelArtifactError, one_line, quoted

_OWN_CODE = ("auto_map", "trust_remote_code")
# Settings by which a library could download code or a kernel, or replace layers. What they ask for
# is never needed to draw, so folders that have them are used without.
_FOREIGN_CODE = re.compile(
    r"_*(attn_implementation|experts_implementation)\w*"
    r"|_*(auto_map|trust_remote_code|custom_pipelines?|quantization_config)"
    r"|_*(use_kernels|kernel_config|kernels|hub_kernels)"
)
# Of these, transformers' own two ways to attend differ where a mask leaves a token nothing to see.
_OWN_ATTENTION = re.compile(r"_?attn_implementation")
_OWN_WAYS = ("eager", "sdpa")
# This activation of transformers imports a kernel of its own, and keeps numbers in bf16.
_FOREIGN_ACTIVATION = "xielu"
_MOST_LEVELS = 16
# The deepest honest network of this family has 32 layers; a config that asks for a million would
# keep the machine busy for hours.
_MOST_LAYERS = 128
# Stable Diffusion's networks have four blocks.
_MOST_BLOCKS = 16
# Layers of a block x transformer layers of each x blocks: SDXL has 60. Building takes 2 ms for one.
_MOST_LAYERS_IN_ALL = 2_048
# Sizes that the libraries take memory for before any weight is read; the widest layer of real
# networks has about 10,000 channels.
_SIZE = re.compile(r"channels|dim|size|heads|groups|embed|kernel|padding|labels|order")
_MOST = 65_536
_MOST_OF: Mapping[str, int] = {
    "vocab_size": 2**24,
    "max_position_embeddings": 16_384,  # the longest in real models has 514
    "image_size": 2_048,  # tables of positions grow with its square
}
_SPACINGS = ("linspace", "leading", "trailing")


def checked(path: Path, config: Mapping[str, Any], part: str) -> dict[str, Any]:
    """Return the configuration of a component, without the settings that would run code.

    path: its file, for messages. Raises ModelArtifactError for one that asks for code of its own,
    for a huge network, or for values that no picture can be drawn with.
    """
    for level, name, value in _entries(config):
        if level > _MOST_LEVELS:
            raise ModelArtifactError(f"{path} nests its settings more than {_MOST_LEVELS} deep.")
        if name in _OWN_CODE and value:
            raise ModelArtifactError(f"{path} asks for code of its own ({name}), which is not run.")
        if value == _FOREIGN_ACTIVATION and "act" in name:
            raise ModelArtifactError(
                f"{path} asks for {one_line(name, 60)} = {quoted(value)}, which runs code from "
                "outside and is not used."
            )
        if isinstance(value, list) and "block" in name and len(value) > _MOST_BLOCKS:
            raise ModelArtifactError(
                f"{path} lists {len(value)} {one_line(name, 60)}, more than {_MOST_BLOCKS}."
            )
        if type(value) in (int, float) and not value <= (most := _most(name)):  # `not`: NaN
            raise ModelArtifactError(
                f"{path} asks for {one_line(name, 60)} = {quoted(value)}, more than {most}."
            )
    for _, _, value in _entries(config):
        if isinstance(value, dict):
            _check_depth(path, value)
    for name, (fits, expected) in _EXPECTED.get(part, {}).items():
        if name in config and not fits(config[name]):
            raise ModelArtifactError(
                f"{path} gives {name} as {quoted(config[name])}, where {expected} is needed."
            )
    if part == "scheduler":
        _check_betas(path, config)
    return _without_code(config)


def _entries(config: Mapping[str, Any]) -> Iterator[tuple[int, str, Any]]:
    """Yield (level, name, value) of a configuration and all in it; items have their list's name.

    There is no recursion: JSON may be nested deeper than Python's stack.
    """
    waiting: list[tuple[int, str, Any]] = [(0, "", config)]
    while waiting:
        level, name, value = entry = waiting.pop()
        yield entry
        if isinstance(value, dict):
            waiting += ((level + 1, key, inner) for key, inner in value.items())
        elif isinstance(value, list):
            waiting += ((level + 1, name, inner) for inner in value)


def _most(name: str) -> float:
    if "layers" in name:
        return _MOST_LAYERS
    return _MOST_OF.get(name, _MOST) if _SIZE.search(name) else math.inf


def _check_depth(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse networks whose blocks and layers are few in each setting, but not when multiplied."""
    blocks = [len(value) for key, value in config.items() if "block" in key and _is_list(value)]
    layers = max([1, *blocks])
    for key, value in config.items():
        if "layers" in key:
            numbers = [n for _, _, n in _entries({key: value}) if type(n) is int]
            layers *= max([1, *numbers])
    if layers > _MOST_LAYERS_IN_ALL:
        raise ModelArtifactError(
            f"{path} asks for a network of {layers} layers, more than {_MOST_LAYERS_IN_ALL}."
        )


def _without_code(config: Mapping[str, Any]) -> dict[str, Any]:
    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return _without_code(value)
        return [clean(inner) for inner in value] if isinstance(value, list) else value

    def is_foreign(key: str, value: object) -> bool:
        own = _OWN_ATTENTION.fullmatch(key) and value in _OWN_WAYS
        return bool(_FOREIGN_CODE.fullmatch(key)) and not own

    return {key: clean(value) for key, value in config.items() if not is_foreign(key, value)}


def _check_betas(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse trained betas that are not one number per training timestep."""
    betas, timesteps = config.get("trained_betas"), config.get("num_train_timesteps", 1000)
    if betas is None or type(timesteps) is not int:
        return
    if not _is_list(betas) or not all(map(_is_number, betas)) or len(betas) < timesteps:
        count = f"{len(betas)} entries" if _is_list(betas) else quoted(betas)
        raise ModelArtifactError(
            f"{path} gives trained_betas as {count}, where a number for each of {timesteps} "
            "timesteps is needed."
        )


def _is_list(value: object) -> bool:
    return isinstance(value, list)


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _is_factor(value: Any) -> bool:
    return _is_number(value) and 1e-6 <= abs(value) <= 1e6


def _is_token_id(value: object) -> bool:
    return value is None or (type(value) is int and -(2**63) <= value < 2**63)


_NUMBER = (_is_number, "a number")
_TOKEN_ID = (_is_token_id, "the number of a token")
# What each part's settings must be; a faulty one would be found only when a picture is drawn.
_EXPECTED: Mapping[str, Mapping[str, tuple[Callable[[Any], bool], str]]] = {
    "vae": {"scaling_factor": (_is_factor, "a number other than 0")},
    "text_encoder": dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), _TOKEN_ID),
    "scheduler": {
        "beta_start": _NUMBER,
        "beta_end": _NUMBER,
        "timestep_spacing": (lambda value: value in _SPACINGS, f"one of {', '.join(_SPACINGS)}"),
    },
}
