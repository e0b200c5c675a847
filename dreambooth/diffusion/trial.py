"""Builds the parts of a model, and tries them with random or empty inputs before their first use.

A configuration may build parts that fail at their first use. The other functions use one part as
drawing and training do, in a fraction of a second for Stable Diffusion too: networks whose size
matters get tensors without data, on the device "meta", which prove the shapes. The functions raise
what the libraries raise, and ValueError for results that are none; `faults_of` makes sentences of
them.

Legend of shapes: B batch, C channels, H W pixels, h w latent cells, L tokens, D text width.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from torch import Tensor
from torch.func import functional_call

from dreambooth.diffusion.step_tables import timesteps_of
from dreambooth.diffusion.text_encoders import BUILD_ERRORS
from dreambooth.errors import ModelArtifactError, in_one_line
from dreambooth.process.memory import is_out_of_memory

try:
    from transformers.initialization import no_init_weights
except ImportError:  # transformers 4, which the Hugging Face toolkit brings
    from transformers.modeling_utils import no_init_weights

_CELLS = 8
_DEVICE_ERRORS = {"OutOfMemoryError", "AcceleratorError"}


@contextlib.contextmanager
def faults_of(config: Path, what: str) -> Iterator[None]:
    """Raise what a library raises for a configuration file as one sentence, ModelArtifactError.

    what: what the file does not describe then.
    """
    try:
        yield
    except BUILD_ERRORS as error:
        # A GPU's errors are no fault of a folder; a CPU runs out of memory for absurd sizes alone.
        on_gpu = torch.cuda.is_available() and is_out_of_memory(error)
        if on_gpu or _DEVICE_ERRORS & {each.__name__ for each in type(error).__mro__}:
            raise
        raise ModelArtifactError(
            f"{config} does not describe a {what}: {in_one_line(error)}."
        ) from error


def build(
    construct: Callable[[dict[str, Any]], Any], settings: dict[str, Any], config: Path
) -> Any:
    """Build a network of the settings that the file `config` holds, for weights that are read next.

    Parameters are neither allocated nor initialised; buffers are both.
    """
    empty_weights = init_empty_weights(include_buffers=False)
    with faults_of(config, "network that can be built"), no_init_weights(), empty_weights:
        return construct(settings)


@torch.no_grad()
def sample(noise_scheduler: Any, *, channels: int, num_inference_steps: int) -> None:
    """Take all steps of a fresh noise scheduler with random predictions."""
    generator = torch.Generator("cpu").manual_seed(0)
    drawn = {"generator": generator} if _takes_generator(noise_scheduler) else {}
    shape = (1, channels, _CELLS, _CELLS)
    with np.errstate(all="ignore"):  # faults are found in the result
        timesteps = timesteps_of(noise_scheduler, num_inference_steps)
        latents = torch.randn(shape, generator=generator) * noise_scheduler.init_noise_sigma
        for timestep in timesteps:
            scaled = noise_scheduler.scale_model_input(latents, timestep)
            pred = torch.randn(scaled.shape, generator=generator)
            made = noise_scheduler.step(pred, timestep, latents, **drawn, return_dict=False)
            latents = made[0]
    if not len(timesteps):
        raise ValueError("it has no steps")
    expect("latents", latents, shape)


def add_noise(noise_scheduler: Any, *, channels: int) -> None:
    """Add noise at the first and the last training timestep, as each training step does."""
    last = noise_scheduler.config.num_train_timesteps - 1
    shape = (2, channels, _CELLS, _CELLS)
    timesteps = torch.tensor([0, last])
    latents = torch.linspace(-1, 1, 2 * channels * _CELLS**2).reshape(shape)
    for make in (noise_scheduler.add_noise, noise_scheduler.get_velocity):
        expect("noisy latents", make(latents, latents.flip(0), timesteps), shape)


def predict(unet: Any, *, cells: int, text: tuple[int, int, int]) -> None:
    """Call a U-Net as every step does: with latents, a timestep and text, and nothing else.

    cells: of the latents' height and width. text: the text's shape [B,L,D].
    """
    latents = _without_data(1, unet.config.in_channels, cells, cells, dtype=unet.dtype)
    hidden = _without_data(*text, dtype=unet.dtype)
    timesteps = torch.zeros(1, dtype=torch.int64, device="meta")
    inputs = (latents, timesteps)
    pred = _call(unet, *inputs, encoder_hidden_states=hidden, return_dict=False)[0]
    expect("prediction", pred, latents.shape)


def encode_and_decode(vae: Any, *, scale: int) -> None:
    """Encode a picture of `_CELLS` latent cells a side and decode it again; scale: their pixels."""
    channels, side = vae.config.latent_channels, _CELLS * scale
    pixels = _without_data(1, 3, side, side, dtype=vae.dtype)
    latents = _without_data(1, channels, _CELLS, _CELLS, dtype=vae.dtype)
    # The encoder returns mean and log variance.
    expect("latents", _call(vae.encoder, pixels), (1, 2 * channels, _CELLS, _CELLS))
    expect("picture", _call(vae.decoder, latents), pixels.shape)


def _takes_generator(noise_scheduler: Any) -> bool:
    return "generator" in inspect.signature(noise_scheduler.step).parameters


def _without_data(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@torch.no_grad()
def _call(network: Any, *inputs: Tensor, **named: Any) -> Any:
    """Call a network with its weights replaced by tensors of the same shapes without data."""
    weights = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    stand_ins = {name: weight.to("meta") for name, weight in weights.items()}
    return functional_call(network, stand_ins, inputs, named)


def expect(what: str, found: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless a tensor has this shape and, where it has data, finite numbers."""
    if found.shape != shape:
        raise ValueError(f"its {what} has the shape {list(found.shape)}, not {list(shape)}")
    if not found.is_meta and not bool(torch.isfinite(found).all()):
        raise ValueError(f"its {what} holds numbers that are not finite")
