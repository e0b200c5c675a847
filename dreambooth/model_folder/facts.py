"""Reads the facts of a model folder that need no torch (standard library only)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth.errors import ModelArtifactError, quoted
from dreambooth.limits import LIMITS, Limits
from dreambooth.model_folder import feature_extractor
from dreambooth.model_folder.headers import read_header
from dreambooth.model_folder.layout import (
    MODEL_INFO,
    TRAINED_PARTS,
    component_config,
    read_json,
    validate_folder,
    weight_files,
)

# The prediction types that diffusion.loss has a target for.
TRAINABLE = ("epsilon", "v_prediction")
# Every side of a picture is a multiple of this many pixels, or of a latent cell if that is larger.
SMALLEST_UNIT = 8
# Far below the smallest U-Net distilled from Stable Diffusion, far above any miniature.
_FULL_SIZE_PARAMETERS = 100_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """The facts of a model that its JSON files and safetensors headers state.

    unet_layer_elements: channels x latent cells, summed over the U-Net's layers, at the model's own
    resolution; the size of its activations is proportional to it. warnings: whole sentences about
    settings of the folder that look wrong.
    """

    prediction_type: str
    resolution: int
    latent_channels: int
    vae_scale_factor: int
    unet_layer_elements: int
    unet_parameters: int
    text_encoder_parameters: int
    vae_parameters: int
    warnings: tuple[str, ...] = ()


def read_facts(folder: Path, *, to_train: bool = True, limits: Limits = LIMITS) -> ModelFacts:
    """Read the facts of a model folder in milliseconds.

    Parameter counts come from safetensors headers; for old `.bin` files they are estimated from
    the file size. Raises ModelArtifactError for a folder that is no Stable Diffusion model and,
    unless `to_train` is False, for one that can draw but not be trained.
    """
    validate_folder(folder, limits=limits)
    unet = component_config(folder, "unet", limits=limits)
    vae = component_config(folder, "vae", limits=limits)
    scheduler = component_config(folder, "scheduler", limits=limits)
    blocks = vae.get("block_out_channels")
    scale = 2 ** (len(blocks) - 1) if isinstance(blocks, list) and 0 < len(blocks) < 10 else 8
    channels = vae.get("latent_channels", 4)
    if type(channels) is not int or not 1 <= channels <= 64:
        raise ModelArtifactError(
            f"{folder / 'vae/config.json'}: latent_channels is {quoted(channels)}."
        )
    steps = scheduler.get("num_train_timesteps", 1000)
    if type(steps) is not int or not 1 <= steps <= 100_000:
        raise ModelArtifactError(
            f"{folder / 'scheduler/scheduler_config.json'}: num_train_timesteps is {quoted(steps)}."
        )
    prediction_type = scheduler.get("prediction_type", "epsilon")
    if prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise ModelArtifactError(
            f"{folder / 'scheduler' / 'scheduler_config.json'} names the unknown prediction_type "
            f"{quoted(prediction_type)}."
        )
    resolution = _resolution(folder, unet, scale, limits)
    counted = {part: _count(folder / part, limits) for part in TRAINED_PARTS}
    facts = ModelFacts(
        prediction_type=prediction_type,
        resolution=resolution,
        latent_channels=channels,
        vae_scale_factor=scale,
        unet_layer_elements=_layer_elements(unet, resolution // scale),
        unet_parameters=counted["unet"],
        text_encoder_parameters=counted["text_encoder"],
        vae_parameters=counted["vae"],
        warnings=_warnings(folder, unet, resolution, counted["unet"], limits),
    )
    if to_train:
        feature_extractor.of_checker(folder, limits=limits)  # the trained model takes it along
        check_trainable(facts, folder / "scheduler" / "scheduler_config.json")
    return facts


def drawn_side(resolution: int, vae_scale_factor: int) -> int:
    """Return the side in pixels of the pictures that a model of this resolution draws.

    A resolution that is no multiple of their unit is rounded down to one.
    """
    unit = max(SMALLEST_UNIT, vae_scale_factor)
    return max(unit, resolution // unit * unit)


def check_trainable(facts: ModelFacts, origin: Path) -> None:
    """Raise ModelArtifactError for a prediction type that the DreamBooth loss has no target for.

    origin: the file that the message names.
    """
    if facts.prediction_type not in TRAINABLE:
        raise ModelArtifactError(
            f"The noise scheduler's prediction_type is {quoted(facts.prediction_type)} ({origin}); "
            "models that predict 'epsilon' or 'v_prediction' can be trained."
        )


def _count(component: Path, limits: Limits) -> int:
    """Return the number of parameters of one component."""
    chosen, files = weight_files(component, limits=limits)
    if chosen.pickled:
        size = sum(path.stat().st_size for path in files)
        return size // (2 if chosen.variant in ("fp16", "bf16") else 4)
    entries = [entry for path in files for entry in read_header(path, limits=limits)]
    return sum(entry.count for entry in entries if entry.is_float)


def _info_resolution(folder: Path, limits: Limits) -> Any:
    info = folder / MODEL_INFO
    return read_json(info, limits=limits).get("resolution") if info.exists() else None


def _resolution(folder: Path, unet: dict[str, Any], scale: int, limits: Limits) -> int:
    value, origin = _info_resolution(folder, limits), folder / MODEL_INFO
    if value is None:
        size = unet.get("sample_size")
        value, origin = (size * scale if type(size) is int else size), folder / "unet/config.json"
    if type(value) is not int or not 8 <= value <= 4096:
        raise ModelArtifactError(
            f"{origin} does not say the model's resolution in pixels (found {quoted(value)})."
        )
    return value


def _warnings(
    folder: Path, unet: dict[str, Any], resolution: int, unet_parameters: int, limits: Limits
) -> tuple[str, ...]:
    """Warn of a full-size U-Net whose config.json states a miniature's sample_size.

    There is no warning where __model_info__.json states the resolution.
    """
    size = unet.get("sample_size")
    is_said_by_the_unet = type(size) is int and size < 64 and not _info_resolution(folder, limits)
    if not is_said_by_the_unet or unet_parameters < _FULL_SIZE_PARAMETERS:
        return ()
    return (
        f"{folder / 'unet' / 'config.json'} says sample_size = {size}, which makes pictures of "
        f"{resolution} x {resolution} pixels: Stable Diffusion 1.x and 2.x were trained at 512 or "
        "768; set sample_size to 64 or 96 there if this model was, too.",
    )


def _layer_elements(unet: dict[str, Any], cells: int) -> int:
    """Return channels x latent cells, summed over the U-Net's layers; 0 where they are unknown.

    Each level has `layers_per_block` layers on the way down and one more on the way up.
    cells: the side of the latents.
    """
    channels, layers = unet.get("block_out_channels"), unet.get("layers_per_block", 2)
    if not isinstance(channels, list) or any(type(n) is not int for n in (layers, *channels)):
        return 0
    levels = ((width, max(1, cells >> level)) for level, width in enumerate(channels))
    elements: int = (2 * layers + 1) * sum(width * side * side for width, side in levels)
    return elements
