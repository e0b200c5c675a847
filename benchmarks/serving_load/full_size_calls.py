"""Time U-Net calls in four ways: plain, as a CUDA graph, with channels last, and with both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from dreambooth.diffusion.model import DiffusionModel, encode_text, tokenize

ROWS: Final = (1, 2, 4, 8)
_WARM_UP = 2
_REPEATS = 3

Inputs = tuple[Tensor, Tensor, Tensor]  # latents, timesteps, encoder_hidden_states


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to make the U-Net's calls, given by the options of `serve` that select it."""

    name: str
    cuda_graphs: bool
    channels_last: bool


EAGER: Final = Way(name="eager", cuda_graphs=False, channels_last=False)
WAYS: Final = (
    EAGER,
    Way(name="graphs", cuda_graphs=True, channels_last=False),
    # channels_last cannot be undone, so the ways without it are measured first.
    Way(name="channels_last", cuda_graphs=False, channels_last=True),
    Way(name="channels_last+graphs", cuda_graphs=True, channels_last=True),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CallFigure:
    """The time of a U-Net call of `rows` rows.

    ms: the median of a few runs. largest_difference: of the output from the eager way's, on inputs
    that were not timed; 0: the same bits.
    """

    rows: int
    ms: float
    largest_difference: float


def inputs(model: DiffusionModel, rows: int, *, seed: int) -> Inputs:
    """Return one call's inputs at the model's own resolution; every row has its own noise and
    timestep.
    """
    draw = torch.Generator("cpu").manual_seed(seed)
    cells = model.resolution // model.vae_scale_factor
    noise = torch.randn((rows, model.latent_channels, cells, cells), generator=draw)
    text = encode_text(model, tokenize(model, [""])).to(model.device, model.unet.dtype)
    return (
        noise.to(model.device, model.unet.dtype),
        torch.randint(0, 1000, (rows,), generator=draw).to(model.device),
        text.repeat(rows, 1, 1),
    )


@torch.inference_mode()
def outputs(model: DiffusionModel) -> dict[int, Tensor]:
    """Return the U-Net's outputs for one set of inputs per row count, float32 on the CPU."""
    return {rows: _call(model.unet, inputs(model, rows, seed=1)).float().cpu() for rows in ROWS}


@torch.inference_mode()
def time_calls(
    model: DiffusionModel, eager: Mapping[int, Tensor], *, calls: int
) -> list[CallFigure]:
    """Time runs of `calls` calls for each row count; eager: the `outputs` of the eager way."""
    figures = []
    for rows in ROWS:
        given = inputs(model, rows, seed=0)
        for _ in range(_WARM_UP):
            _call(model.unet, given)
        times = [_run_s(model, given, calls) / calls for _ in range(_REPEATS)]
        found = _call(model.unet, inputs(model, rows, seed=1)).float().cpu()
        figures.append(
            CallFigure(
                rows=rows,
                ms=1000 * statistics.median(times),
                largest_difference=float((found - eager[rows]).abs().max()),
            )
        )
    return figures


@torch.inference_mode()
def record(model: DiffusionModel, most_rows: int) -> None:
    """Make a call of every row count up to most_rows, so that every CUDA graph is captured."""
    for rows in range(1, most_rows + 1):
        _call(model.unet, inputs(model, rows, seed=0))


def wait(device: torch.device) -> None:
    """Wait until the device has finished everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _run_s(model: DiffusionModel, given: Inputs, calls: int) -> float:
    wait(model.device)
    began = time.perf_counter()
    for _ in range(calls):
        _call(model.unet, given)
    wait(model.device)
    return time.perf_counter() - began


def _call(unet: Any, given: Inputs) -> Tensor:
    latents, timesteps, text = given
    output: Tensor = unet(latents, timesteps, encoder_hidden_states=text, return_dict=False)[0]
    return output
