"""Time pictures of the real engine and of diffusers' pipeline.

The engine is timed with each way of making its U-Net calls.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from benchmarks.serving_load import full_size_calls, redrawing
from benchmarks.serving_load.full_size_calls import WAYS, CallFigure, Way
from benchmarks.serving_load.redrawing import Agreement
from dreambooth.diffusion import model as models
from dreambooth.diffusion.float_types import dtype_for
from dreambooth.diffusion.model import DiffusionModel, sampling_scheduler
from dreambooth.diffusion.sampling_request import SamplingRequest
from dreambooth.fast import served_unet
from dreambooth.fast.served_unet import GraphedUNet
from dreambooth.serving.engine.engine import MAX_ROWS, Engine
from dreambooth.serving.engine.row_limits import free_caches

AT_ONCE: Final = 8
_PROMPT = "a photo of a dog"
_GUIDANCE_SCALE = 7.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """The size of a run.

    calls: in each run of U-Net calls. steps: of a picture. alone: pictures drawn one after another.
    burst: pictures drawn 8 at once. redrawn: pictures compared in exact mode, in calls of
    batch_rows rows.
    """

    calls: int
    steps: int
    alone: int
    burst: int
    redrawn: int
    batch_rows: int
    warm_up_budget_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuMemory:
    """GPU memory in bytes: torch's peaks, and the whole GPU's use at the end (`in_use`)."""

    allocated: int
    reserved: int
    in_use: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WayFigures:
    """The figures of one way of making U-Net calls.

    picture_s: one guided picture from request to pixels. rows: the most that the engine's calls
    had. exact: pictures drawn again in traffic in exact mode. graphs: how many CUDA graphs exist at
    the end, among them one for every row count up to the engine's max_rows; 0 for a way with graphs
    means that they were given up, and the log says why. peak: None on a CPU.
    """

    way: str
    calls: list[CallFigure]
    picture_s: float
    alone_per_s: float
    burst_per_s: float
    rows: int
    exact: Agreement
    graphs: int
    peak: GpuMemory | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FullSize:
    """The figures of all ways.

    peer_picture_s: of diffusers' StableDiffusionPipeline with the same networks, eager.
    """

    dtype: str
    pixels: int
    peer_picture_s: float
    ways: list[WayFigures]


def measure(
    folder: Path,
    device: torch.device,
    effort: Effort,
    *,
    say: Callable[[str], None],
    found: Callable[[WayFigures | float], None] = lambda _: None,
) -> FullSize:
    """Measure every way that the device supports.

    say(what): called with what is measured next. found: called with the seconds of diffusers'
    picture and then with each way's figures, for a caller that may be cut off.
    """
    model = models.load(folder, device=device, dtype=dtype_for("auto", device))
    say("diffusers' pipeline")
    peer_picture_s = _peer_picture_s(model, effort)
    found(peer_picture_s)
    eager = full_size_calls.outputs(model)
    ways = []
    for way in WAYS:
        if way.cuda_graphs and device.type != "cuda":
            continue
        say(way.name)
        free_caches()
        ways.append(_measure_way(model, way, eager, effort))
        found(ways[-1])
    return FullSize(
        dtype=str(model.unet.dtype).removeprefix("torch."),
        pixels=model.resolution,
        peer_picture_s=peer_picture_s,
        ways=ways,
    )


def _measure_way(
    model: DiffusionModel, way: Way, eager: Mapping[int, Tensor], effort: Effort
) -> WayFigures:
    device = model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model = dataclasses.replace(model)  # a copy, because its U-Net may be replaced
    served_unet.prepare(model, cuda_graphs=way.cuda_graphs, channels_last=way.channels_last)
    calls = full_size_calls.time_calls(model, eager, calls=effort.calls)
    if way.cuda_graphs:
        full_size_calls.record(model, MAX_ROWS)
    with Engine(model, warm_up_budget_s=effort.warm_up_budget_s) as engine:
        rows = engine.start().rows
        _pictures_s(engine, effort, pictures=1, at_once=1)
        times = [_pictures_s(engine, effort, pictures=1, at_once=1) for _ in range(effort.alone)]
        burst_s = _pictures_s(engine, effort, pictures=effort.burst, at_once=AT_ONCE)
    with Engine(model, batch_rows=effort.batch_rows, warm_up_budget_s=0.0) as engine:
        engine.start()
        agreement = redrawing.compare(engine, pictures=effort.redrawn, seed=0)
    return WayFigures(
        way=way.name,
        calls=calls,
        picture_s=statistics.median(times),
        alone_per_s=effort.alone / sum(times),
        burst_per_s=effort.burst / burst_s,
        rows=rows,
        exact=agreement,
        graphs=len(model.unet.graphs) if isinstance(model.unet, GraphedUNet) else 0,
        peak=_peak(device),
    )


def _pictures_s(engine: Engine, effort: Effort, *, pictures: int, at_once: int) -> float:
    """Return the seconds for `pictures` pictures, requested by `at_once` clients one at a time
    each.
    """

    def draw(seed: int) -> None:
        request = SamplingRequest(
            prompt=_PROMPT,
            num_inference_steps=effort.steps,
            guidance_scale=_GUIDANCE_SCALE,
            seed=seed,
        )
        engine.submit([request]).result()

    began = time.perf_counter()
    with ThreadPoolExecutor(at_once) as clients:
        list(clients.map(draw, range(pictures)))
    return time.perf_counter() - began


def _peer_picture_s(model: DiffusionModel, effort: Effort) -> float:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
        vae=model.vae,
        text_encoder=model.text_encoder,
        tokenizer=model.tokenizer,
        unet=model.unet,
        scheduler=sampling_scheduler(model),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    times = []
    for seed in range(effort.alone + 1):
        began = time.perf_counter()
        pipeline(
            _PROMPT,
            num_inference_steps=effort.steps,
            guidance_scale=_GUIDANCE_SCALE,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="np",  # the picture is on the CPU when it returns
        )
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def _peak(device: torch.device) -> GpuMemory | None:
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return GpuMemory(
        allocated=torch.cuda.max_memory_allocated(device),
        reserved=torch.cuda.max_memory_reserved(device),
        in_use=total - free,
    )
