"""Compare pictures drawn alone with the same pictures drawn again in random traffic."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.serving_load.traffic import GUIDANCE_SCALES, PROMPTS
from dreambooth.diffusion.sampling_request import SamplingRequest
from dreambooth.serving.contract.reply import Picture
from dreambooth.serving.engine.engine import Engine

MOST_STEPS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """The differences between pictures drawn alone and in traffic.

    bytes_differing: in all pictures together. largest_difference: of one byte, 0..255. not_exact:
    pictures whose reply would say that exactness was lifted.
    """

    pictures: int
    bytes_differing: int
    largest_difference: int
    not_exact: int


def compare(engine: Engine, *, pictures: int, seed: int) -> Agreement:
    """Draw pictures one by one, then again in random order, several at once, at random moments."""
    draw = random.Random(seed)
    requests = [_request(draw, engine.facts.resolution, engine.facts.unit) for _ in range(pictures)]
    began = time.perf_counter()
    alone = [engine.submit([request]).result()[0] for request in requests]
    pause_s = (time.perf_counter() - began) / pictures
    again = _in_traffic(engine, requests, draw, pause_s)
    differences = [
        np.abs(one.pixels.astype(np.int16) - other.pixels)
        for one, other in zip(alone, again, strict=True)
    ]
    return Agreement(
        pictures=pictures,
        bytes_differing=sum(int(np.count_nonzero(each)) for each in differences),
        largest_difference=max(int(each.max()) for each in differences),
        not_exact=sum(not picture.exact for picture in (*alone, *again)),
    )


def _request(draw: random.Random, resolution: int, unit: int) -> SamplingRequest:
    """Return a random request for a picture of the model's own size or of a narrower one."""
    narrow = max(unit, resolution * 3 // 4 // unit * unit)
    return SamplingRequest(
        prompt=draw.choice(PROMPTS),
        negative_prompt=draw.choice(("", *PROMPTS)),
        num_inference_steps=draw.randint(1, MOST_STEPS),
        guidance_scale=draw.choice(GUIDANCE_SCALES),
        width=draw.choice((None, None, narrow)),
        seed=draw.randrange(2**64),
    )


def _in_traffic(
    engine: Engine, requests: Sequence[SamplingRequest], draw: random.Random, pause_s: float
) -> list[Picture]:
    """Submit one to three pictures at a time; return them in the order of `requests`.

    pause_s: about the time that one picture takes alone.
    """
    order = draw.sample(range(len(requests)), len(requests))
    jobs = []
    while order:
        numbers = [order.pop() for _ in range(min(len(order), draw.randint(1, 3)))]
        jobs.append((numbers, engine.submit([requests[number] for number in numbers])))
        time.sleep(draw.choice((0.0, draw.expovariate(2 / pause_s))))
    pictures: dict[int, Picture] = {}
    for numbers, job in jobs:
        pictures |= dict(zip(numbers, job.result(), strict=True))
    return [pictures[number] for number in range(len(requests))]
