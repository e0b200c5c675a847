"""Measure what the device can do at all, and state which machine it is.

Every other figure is read beside these: no step is shorter than its FLOPs at this rate, and no
launch costs less than this one.
"""

from __future__ import annotations

import os
import platform
import time

import torch
from torch import nn

from benchmarks import provenance
from benchmarks.gpu_stages.facts import FactFile
from benchmarks.gpu_stages.running import StageContext
from benchmarks.train_step import work
from dreambooth.training import device as devices
from dreambooth.training.mixed_precision import DTYPES

_LAUNCHES = 5000


def ceilings(context: StageContext, facts: FactFile) -> None:
    """State the machine; measure matrix products, copies, convolutions and launches."""
    found = devices.from_torch(torch)
    device = torch.device(found.kind)
    facts.add(
        "machine",
        found.name,
        **provenance.facts(device),
        python=platform.python_version(),
        cores=len(os.sched_getaffinity(0)),
        compute_capability=found.compute_capability,
        memory_bytes=found.memory_bytes,
        free_bytes=found.free_bytes,
        bitsandbytes=_bitsandbytes(),
        dry=context.dry,
    )
    rates = work.measure(found, small=context.dry)
    facts.add("ceiling", "matrix products", value=rates.flop_per_s / 1e12, unit="TFLOP/s")
    facts.add("ceiling", "copy, read and written", value=rates.bytes_per_s / 1e9, unit="GB/s")
    for layout in (torch.contiguous_format, torch.channels_last):
        rate = _convolution_flop_per_s(device, DTYPES[found.mixed_precision], layout, context.dry)
        name = f"3 x 3 convolutions, {str(layout).removeprefix('torch.')}"
        facts.add("ceiling", name, value=rate / 1e12, unit="TFLOP/s")
    facts.add("ceiling", "a launch, on the host", value=1e6 * _launch_s(device), unit="us")


def _bitsandbytes() -> str:
    """Return the version of bitsandbytes, or why it cannot be loaded."""
    try:
        import bitsandbytes
    except (ImportError, RuntimeError, OSError) as error:
        return f"cannot be loaded: {error}"
    return str(bitsandbytes.__version__)


def _convolution_flop_per_s(
    device: torch.device, dtype: torch.dtype, layout: torch.memory_format, small: bool
) -> float:
    """Return the rate of forward passes as the U-Net's largest level makes them."""
    rows, channels, side = (1, 32, 16) if small else (8, 320, 64)
    with torch.device(device):
        convolution = nn.Conv2d(channels, channels, 3, padding=1, dtype=dtype)
        pixels = torch.rand(rows, channels, side, side, dtype=dtype)
    convolution = convolution.to(memory_format=layout)  # type: ignore[call-overload]
    pixels = pixels.to(memory_format=layout)
    with torch.inference_mode():
        seconds = work.shortest_s(lambda: convolution(pixels), device)
    return 2 * 9 * rows * (channels * side) ** 2 / seconds


def _launch_s(device: torch.device) -> float:
    """Return the seconds of the host per operation that leaves the device almost nothing to do."""
    small = torch.zeros(64, device=device)
    work.shortest_s(lambda: small.add_(1), device)
    began = time.perf_counter()
    for _ in range(_LAUNCHES):
        small.add_(1)
    return (time.perf_counter() - began) / _LAUNCHES
