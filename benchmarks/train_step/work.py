"""Count what a step costs at least: the U-Net's FLOPs and the bytes that the optimizer moves.

floor = FLOPs / peak + parameters x bytes / bandwidth, without overlap and without the memory
traffic of activations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from dreambooth.model_folder.facts import read_facts
from dreambooth.model_folder.layout import component_config
from dreambooth.settings.hyperparameters import MEMORY_PLANS
from dreambooth.training.device import DeviceFacts
from dreambooth.training.mixed_precision import DTYPES


@dataclass(frozen=True, slots=True, kw_only=True)
class PeakRates:
    """The peak rates of a device: FLOP/s of matrix products, bytes/s of its memory."""

    flop_per_s: float
    bytes_per_s: float
    source: str


# Half precision. T4: data sheet. A10G: measured products (its data sheet states 125 TFLOP/s). H100:
# dense products and memory rates that well-tuned kernels reach.
CARDS = {
    "Tesla T4": PeakRates(flop_per_s=65e12, bytes_per_s=320e9, source="table"),
    "NVIDIA A10G": PeakRates(flop_per_s=70e12, bytes_per_s=600e9, source="table"),
    "NVIDIA H100 80GB HBM3": PeakRates(flop_per_s=800e12, bytes_per_s=3.0e12, source="table"),
}


def count_flops(model: Path, pictures: int) -> int:
    """Return the FLOPs of a model folder's U-Net for a forward and backward pass on `pictures`."""
    facts = read_facts(model)
    return unet_flops(
        component_config(model, "unet"),
        pictures=pictures,
        side=facts.resolution // facts.vae_scale_factor,
        tokens=component_config(model, "text_encoder")["max_position_embeddings"],
    )


def unet_flops(config: Mapping[str, Any], *, pictures: int, side: int, tokens: int) -> int:
    """Return the same for a configuration and `side` x `side` latents; nothing is computed."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(config))
        latents = torch.empty(pictures, unet.config.in_channels, side, side)
        timesteps = torch.empty(pictures, dtype=torch.long)
        text = torch.empty(pictures, tokens, unet.config.cross_attention_dim)
        with FlopCounterMode(display=False) as counter:
            unet(latents, timesteps, text).sample.sum().backward()
    flops: int = counter.get_total_flops()
    return flops


def optimizer_bytes(memory_plan: str, mixed_precision: str) -> int:
    """Return the bytes per parameter: one pass for the gradient norm, then one fused AdamW.

    AdamW reads weight, gradient and two states, and writes weight and states. Each has 4 bytes, an
    8-bit state 1. In mixed precision gradients have 2 bytes, and a half-precision copy of the
    weight is written as well.
    """
    plan = MEMORY_PLANS[memory_plan]
    states = 4 if plan.use_8bit_adam else 16
    return states + (14 if mixed_precision != "no" else 16)


def peak(device: DeviceFacts) -> PeakRates:
    """Return the rates of a known card; those of another device are measured now."""
    return CARDS.get(device.name) or measure(device)


def measure(device: DeviceFacts, *, small: bool = False) -> PeakRates:
    """Measure the rates of a device that has nothing else to do; small: in a moment, roughly."""
    on = torch.device(device.kind)
    side, elements = (8192, 2**28) if device.kind == "cuda" else (1024, 2**25)
    if small:
        side, elements = 256, 2**20
    left = torch.rand(side, side, device=on, dtype=DTYPES[device.mixed_precision])
    source = torch.rand(elements, device=on)
    target = torch.empty_like(source)
    return PeakRates(
        flop_per_s=2 * side**3 / shortest_s(lambda: left @ left, on),
        bytes_per_s=8 * elements / shortest_s(lambda: target.copy_(source), on),
        source="measured here: matrix product, copy",
    )


def shortest_s(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the shortest of a few calls, until the device has finished."""
    found = []
    for _ in range(7):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - began)
    return min(found)
