"""Seeded traffic for the serving benchmark, and the figures that sum up a run."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from dreambooth.diffusion.sampling_request import SamplingRequest

LOADS = (0.5, 0.8, 1.3)  # of serial capacity
STEPS = (20, 25, 30, 50)
GUIDANCE_SCALES = (1.0, 5.0, 7.5, 10.0)  # a quarter of the pictures is not guided
PROMPTS = ("a photo of a dog", "a cat on the beach", "a dog in the snow", "a sketch of a cat")


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A request for one picture, `seconds` after the start."""

    seconds: float
    request: SamplingRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadFigures:
    """The figures of one policy for one trace of arrivals.

    load: as a share of serial capacity. pXX_s: percentiles (nearest rank) of the seconds from a
    picture's arrival to its end, the wait for a free device included. throughput_per_s: pictures
    divided by the time when the last was done.
    """

    load: float
    policy: str
    pictures: int
    offered_per_s: float
    throughput_per_s: float
    p50_s: float
    p95_s: float
    p99_s: float


def every_kind(steps: Sequence[int]) -> list[SamplingRequest]:
    """Return each number of steps with each guidance scale once: the mean of the traffic."""
    return [
        SamplingRequest(
            prompt=PROMPTS[number % len(PROMPTS)],
            num_inference_steps=count,
            guidance_scale=scale,
            seed=number,
        )
        for number, (count, scale) in enumerate(itertools.product(steps, GUIDANCE_SCALES))
    ]


def poisson(per_s: float, count: int, *, steps: Sequence[int], seed: int) -> list[Arrival]:
    """Return `count` requests at random times, `per_s` per second; the seed fixes them."""
    draw = random.Random(seed)
    seconds, arrivals = 0.0, []
    for _ in range(count):
        seconds += draw.expovariate(per_s)
        request = SamplingRequest(
            prompt=draw.choice(PROMPTS),
            num_inference_steps=draw.choice(steps),
            guidance_scale=draw.choice(GUIDANCE_SCALES),
            seed=draw.randrange(2**32),
        )
        arrivals.append(Arrival(seconds=seconds, request=request))
    return arrivals


def figures(
    policy: str, load: float, arrivals: Sequence[Arrival], finished: Sequence[float]
) -> LoadFigures:
    """Sum up a run; finished: when each arrival's picture was done, in seconds from the start."""
    latencies = sorted(
        end - arrival.seconds for arrival, end in zip(arrivals, finished, strict=True)
    )

    def percentile(share: float) -> float:
        return latencies[math.ceil(share * len(latencies)) - 1]

    return LoadFigures(
        load=load,
        policy=policy,
        pictures=len(arrivals),
        offered_per_s=len(arrivals) / arrivals[-1].seconds,
        throughput_per_s=len(arrivals) / max(finished),
        p50_s=percentile(0.50),
        p95_s=percentile(0.95),
        p99_s=percentile(0.99),
    )


def table(rows: Sequence[LoadFigures]) -> str:
    """Return the figures as a table, a line each."""
    lines = [
        f"{'load':>5} {'policy':<14}{'pictures':>9}{'per s':>9}{'p50 s':>9}{'p95 s':>9}{'p99 s':>9}"
    ]
    for row in rows:
        times = "".join(f"{value:>9.3f}" for value in (row.p50_s, row.p95_s, row.p99_s))
        lines.append(
            f"{row.load:>5} {row.policy:<14}{row.pictures:>9}{row.throughput_per_s:>9.3f}{times}"
        )
    return "\n".join(lines)
