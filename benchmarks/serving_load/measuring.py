"""Measure serving on the real engine, in one process: every policy, load and check."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.serving_load import overhead, redrawing, traffic
from benchmarks.serving_load.overhead import ROWS
from benchmarks.serving_load.policies import (
    REQUEST_LEVEL,
    SERIAL,
    STEP_LEVEL,
    WallClock,
    alike,
    batch_by_batch,
    oldest,
    step_by_step,
)
from benchmarks.serving_load.redrawing import Agreement
from benchmarks.serving_load.traffic import Arrival, LoadFigures
from dreambooth.diffusion import sampling
from dreambooth.diffusion.float_types import dtype_for
from dreambooth.diffusion.model import DiffusionModel, encode_text, tokenize
from dreambooth.diffusion.model import load as load_model
from dreambooth.diffusion.sampling_request import SamplingRequest
from dreambooth.serving.engine.engine import Engine
from dreambooth.serving.engine.warm_up import WarmUp


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadScale:
    """The size of a run.

    seconds: of arrivals, per load and policy. steps: the numbers of steps that requests ask for.
    redrawn: pictures drawn again in each mode (in bf16 a quarter of them); exact calls have
    batch_rows rows. overhead_steps: U-Net calls for the engine's own time.
    """

    seconds: float
    steps: tuple[int, ...]
    warm_up_budget_s: float
    redrawn: int
    batch_rows: int
    overhead_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Loads:
    """The figures of the three policies under every load.

    serial_per_s: pictures per second of the serial policy, which is load 1.
    """

    warm_up: WarmUp
    serial_per_s: float
    figures: list[LoadFigures]


@dataclass(frozen=True, slots=True, kw_only=True)
class Overhead:
    """The engine's own milliseconds per step at `rows` rows.

    guided_ms: all pictures guided, two rows each; None for one row. unguided_ms: none guided.
    """

    rows: int
    guided_ms: float | None
    unguided_ms: float


def measure_loads(
    folder: Path,
    device: torch.device,
    scale: LoadScale,
    *,
    seed: int,
    say: Callable[[str], None],
) -> Loads:
    """Measure the serial capacity, then serve the same trace of arrivals by each policy.

    say(what): called with what is measured next.
    """
    model = load_model(folder, device=device, dtype=dtype_for("auto", device))
    with Engine(model, warm_up_budget_s=scale.warm_up_budget_s) as engine:
        warm_up = engine.start()
        runs = _policies(engine, model, warm_up.rows)
        alone = [
            Arrival(seconds=0.0, request=request) for request in traffic.every_kind(scale.steps)
        ]
        for run in runs.values():  # whatever the first calls build is built now
            run(alone[:2])
        serial_per_s = len(alone) / max(runs[SERIAL](alone))
        found: list[LoadFigures] = []
        for load in traffic.LOADS:
            per_s = load * serial_per_s
            count = max(1, round(per_s * scale.seconds))
            arrivals = traffic.poisson(per_s, count, steps=scale.steps, seed=seed)
            for policy, run in runs.items():
                say(f"{policy} at {load} of serial capacity: {count} pictures")
                found.append(traffic.figures(policy, load, arrivals, run(arrivals)))
    return Loads(warm_up=warm_up, serial_per_s=serial_per_s, figures=found)


def measure_overhead(folder: Path, device: torch.device, scale: LoadScale) -> list[Overhead]:
    """Measure the engine's own time per step for calls of 1, 2, 4 and 8 rows."""
    model = load_model(folder, device=device, dtype=dtype_for("auto", device))

    def ms(rows: int, *, guided: bool) -> float:
        return overhead.measure(model, rows=rows, guided=guided, steps=scale.overhead_steps)

    return [
        Overhead(
            rows=rows,
            guided_ms=ms(rows, guided=True) if rows > 1 else None,
            unguided_ms=ms(rows, guided=False),
        )
        for rows in ROWS
    ]


def measure_agreement(
    folder: Path, device: torch.device, scale: LoadScale, *, seed: int
) -> dict[str, Agreement]:
    """Draw pictures alone and again in traffic: exactly, elastically, and elastically in bf16.

    In bf16 a quarter as many pictures are drawn.
    """
    found: dict[str, Agreement] = {}
    for mode, precision, batch_rows, pictures in (
        ("exact", "auto", scale.batch_rows, scale.redrawn),
        ("elastic", "auto", None, scale.redrawn),
        ("elastic bf16", "bf16", None, max(1, scale.redrawn // 4)),
    ):
        model = load_model(folder, device=device, dtype=dtype_for(precision, device))
        with Engine(model, batch_rows=batch_rows, warm_up_budget_s=0.0) as engine:
            engine.start()
            found[mode] = redrawing.compare(engine, pictures=pictures, seed=seed)
    return found


def _policies(
    engine: Engine, model: DiffusionModel, rows: int
) -> dict[str, Callable[[Sequence[Arrival]], list[float]]]:
    """Return the ways to serve arrivals, by name.

    The request-level way draws with `sampling.generate`; its prompts are encoded once, as the
    engine does.
    """
    strings = ("", *traffic.PROMPTS)
    text = {string: encode_text(model, tokenize(model, [string])) for string in strings}

    def serially(requests: Sequence[SamplingRequest]) -> Iterable[object]:
        return engine.submit(requests).result()

    def together(requests: Sequence[SamplingRequest]) -> Iterable[object]:
        return sampling.generate(model, requests, batch_size=len(requests), text=text)

    return {
        SERIAL: lambda arrivals: batch_by_batch(arrivals, oldest, serially, WallClock()),
        REQUEST_LEVEL: lambda arrivals: batch_by_batch(
            arrivals, alike(rows), together, WallClock()
        ),
        STEP_LEVEL: lambda arrivals: step_by_step(engine, arrivals),
    }
