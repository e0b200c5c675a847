"""Measure what a request costs beside the engine's time: HTTP, parsing, admission, wire, encoding.

The engine runs in its process as always, with a stop-watch from the moment it receives a request to
the end of the request's last picture (`timed_engine`). Requests come one after the other, so the
n-th line of the log belongs to the n-th request. The rest of the client's time is the overhead.
"""

from __future__ import annotations

import re
import time
from typing import Final

import numpy as np

from benchmarks.server_probes.outcome import Figure, ProbeOutcome, percentile
from benchmarks.server_probes.server import Server, start
from dreambooth.serving.contract import reply
from dreambooth.serving.contract.reply import Picture
from dreambooth.serving.contract.request import GenerationRequest

PROGRAM: Final = "benchmarks.server_probes.timed_server"
GOAL_MS: Final = 5.0
_SECONDS: Final = re.compile(r"^engine seconds (\S+)$", re.M)
_WARM_UP: Final = 2


def run(model: str, *, requests: int = 300) -> ProbeOutcome:
    """Send `requests` requests at the model's own size and a third as many at 512 x 512, as
    image/jpeg.
    """
    with start(model, program=PROGRAM) as server:
        return measure(server, requests=requests)


def measure(server: Server, *, requests: int) -> ProbeOutcome:
    """Measure on a server that `timed_server` has started."""
    own = _beside_engine(server, {}, requests)
    large = _beside_engine(server, {"width": 512, "height": 512}, max(1, requests // 3))
    encoding = _encoding(requests)
    return ProbeOutcome(
        probe="overhead",
        figures=(
            Figure(name="requests_own_size", value=len(own)),
            Figure(name="own_size_p50_ms", value=percentile(own, 50)),
            Figure(name="own_size_p99_ms", value=percentile(own, 99), at_most=GOAL_MS),
            Figure(name="requests_512", value=len(large)),
            Figure(name="size_512_p50_ms", value=percentile(large, 50)),
            Figure(name="size_512_p99_ms", value=percentile(large, 99), at_most=GOAL_MS),
            Figure(name="encode_512_p50_ms", value=percentile(encoding, 50)),
            Figure(name="encode_512_p99_ms", value=percentile(encoding, 99)),
        ),
    )


def _beside_engine(server: Server, size: dict[str, object], requests: int) -> list[float]:
    """Return the milliseconds of each request in which the engine did not work on it."""
    asked = {"prompt": "a cat", "num_inference_steps": 1, "guidance_scale": 1, **size}
    for _ in range(_WARM_UP):
        server.draw(asked, accept="image/jpeg")
    time.sleep(0.1)  # until the lines of earlier requests are in the log
    logged = len(_SECONDS.findall(server.log))
    spent = []
    for _ in range(requests):
        answer = server.draw(asked, accept="image/jpeg")
        assert answer.status == 200, answer.body
        spent.append(answer.seconds)
    server.wait_until(
        lambda: len(_SECONDS.findall(server.log)) >= logged + requests, "the engine's times"
    )
    engine = [float(seconds) for seconds in _SECONDS.findall(server.log)[logged:]]
    return [
        (all_of_it - of_engine) * 1e3 for all_of_it, of_engine in zip(spent, engine, strict=True)
    ]


def _encoding(count: int) -> list[float]:
    """Return the milliseconds of `reply.encode` for 512 x 512 noise, the slowest picture."""
    request = GenerationRequest(
        form="json",
        prompts=("a cat",),
        negative_prompts=("",),
        echo="a cat",
        height=512,
        width=512,
        num_inference_steps=1,
        guidance_scale=7.5,
        num_images_per_prompt=1,
        eta=0.0,
        seed=0,
        batch_size=None,
    )
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    pictures = [Picture(pixels=noise, seed=0, finish_reason="SUCCESS")]
    spent = []
    for _ in range(count):
        begun = time.perf_counter()
        reply.encode(request, pictures, reply.JPEG)
        spent.append((time.perf_counter() - begun) * 1e3)
    return spent
