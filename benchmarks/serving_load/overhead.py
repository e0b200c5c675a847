"""Measure the engine's own time per step: the time between calls of a U-Net that does nothing."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from dreambooth.diffusion.model import DiffusionModel
from dreambooth.diffusion.sampling_request import SamplingRequest
from dreambooth.serving.engine.engine import Engine

CELLS = 64  # per side of a latent: Stable Diffusion at 512 x 512
ROWS = (1, 2, 4, 8)
_STEPS = 900  # more than are measured


class NoUNet(torch.nn.Module):
    """A stand-in U-Net that returns its input and notes when it was called, with how many rows."""

    def __init__(self, like: Any) -> None:
        """Take the device and the dtype of the U-Net `like`."""
        super().__init__()
        first = next(iter(like.parameters()))
        self.nothing = torch.nn.Parameter(first.new_zeros(1), requires_grad=False)
        self.calls: list[tuple[float, int]] = []

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of inputs and outputs."""
        return self.nothing.dtype

    def forward(self, sample: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
        """Return sample [R,C,h,w] unchanged."""
        self.calls.append((time.perf_counter(), len(sample)))
        return (sample,)


def measure(model: DiffusionModel, *, rows: int, guided: bool, steps: int) -> float:
    """Return the milliseconds from one U-Net call to the next, the median of `steps` of them.

    All `rows` are running already, and no picture joins or leaves: what is timed is noise
    schedulers, guidance, gathering and locks.
    """
    unet = NoUNet(model.unet)
    engine = Engine(
        dataclasses.replace(model, unet=unet),
        max_rows=max(rows, 2),
        warm_up_budget_s=0.0,
    )
    with engine:
        engine.start()
        unet.calls.clear()
        side = CELLS * model.vae_scale_factor
        job = engine.submit(
            [
                SamplingRequest(
                    prompt="a dog",
                    num_inference_steps=min(_STEPS, engine.facts.max_steps),
                    guidance_scale=7.5 if guided else 1.0,
                    width=side,
                    height=side,
                    seed=seed,
                )
                for seed in range(rows // 2 if guided else rows)
            ]
        )
        while len(unet.calls) <= steps and not job.done:
            time.sleep(0.02)
        job.cancel()
    calls = unet.calls[: steps + 1]
    assert {count for _, count in calls} == {rows}
    moments = [moment for moment, _ in calls]
    gaps = [after - before for before, after in itertools.pairwise(moments)]
    return 1000 * statistics.median(gaps)
