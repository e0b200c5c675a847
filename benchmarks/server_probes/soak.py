"""Serve for a long time: memory must not grow with requests, nor files and threads at all.

The same check is made on a server with a planted leak (`leaky_server`), and must catch it.
"""

from __future__ import annotations

import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np

from benchmarks.server_probes import processes
from benchmarks.server_probes.outcome import Figure, ProbeOutcome
from benchmarks.server_probes.processes import Usage
from benchmarks.server_probes.server import JSON, JSON_JPEG, Server, start

LEAKY: Final = "benchmarks.server_probes.leaky_server"
SLOPE_MB: Final = 1.0  # per 1,000 requests
CLIENTS: Final = 4
# The share of samples that are left out, from a server whose caches, pools and threads still fill.
WARM_UP_SHARE: Final = 0.3
_KINDS: Final = (JSON, JSON_JPEG, "application/json;png", "image/webp")
_SIDES: Final = (64, 32, 48)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The resources of both processes between requests, after `requests` requests in all."""

    requests: int
    server: Usage
    engine: Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """The growth after the warm-up.

    slope_mb: MB per 1,000 requests. files, threads: the fewest in the second half of the samples
    less the most in the first, at least 0. otherwise: replies without status 200.
    """

    requests: int
    slope_mb: float
    files: int
    threads: int
    otherwise: int

    @property
    def leaks(self) -> bool:
        """Return whether memory grows faster than SLOPE_MB."""
        return self.slope_mb > SLOPE_MB


def run(model: str, *, minutes: float) -> ProbeOutcome:
    """Soak a server for `minutes`, and one with a planted leak for a tenth of that."""
    with start(model) as server:
        sound = soak(server, seconds=60 * minutes)
        left = server.gauges_left()
    with start(model, program=LEAKY) as server:
        leaky = soak(server, seconds=6 * minutes)
    return outcome(sound, leaky, left)


def outcome(sound: Growth, leaky: Growth, gauges_left: int) -> ProbeOutcome:
    """Return the figures with their bounds."""
    return ProbeOutcome(
        probe="soak",
        figures=(
            Figure(name="requests", value=sound.requests),
            Figure(name="slope_mb_per_1000", value=round(sound.slope_mb, 3), at_most=SLOPE_MB),
            Figure(name="files_grown", value=sound.files, at_most=0),
            Figure(name="threads_grown", value=sound.threads, at_most=0),
            Figure(name="statuses_not_200", value=sound.otherwise, at_most=0),
            Figure(name="gauges_left", value=gauges_left, at_most=0),
            Figure(name="planted_leak_requests", value=leaky.requests),
            Figure(name="planted_leak_mb_per_1000", value=round(leaky.slope_mb, 3)),
            Figure(name="planted_leak_caught", value=leaky.leaks, at_least=1),
        ),
    )


def soak(server: Server, *, seconds: float, batch: int = 100) -> Growth:
    """Request small pictures for `seconds`, in at least 10 batches, with a sample after each."""
    end, samples, otherwise = time.monotonic() + seconds, list[Sample](), 0
    numbers = itertools.count()
    with ThreadPoolExecutor(CLIENTS) as clients:
        while time.monotonic() < end or len(samples) < 10:
            some = list(itertools.islice(numbers, batch))
            statuses = list(clients.map(lambda i: _draw(server, i), some))
            otherwise += sum(status != 200 for status in statuses)
            server.gauges_left()
            samples.append(_sample(server, some[-1] + 1))
    return growth(samples, otherwise)


def growth(samples: list[Sample], otherwise: int = 0) -> Growth:
    """Return the growth after the warm-up; the slope is a least-squares fit to both processes'
    memory.
    """
    steady = samples[int(len(samples) * WARM_UP_SHARE) :]
    counts = np.array([sample.requests for sample in steady], np.float64)
    memory = [sample.server.rss_bytes + sample.engine.rss_bytes for sample in steady]
    slope = np.polyfit(counts, np.array(memory, np.float64), 1)[0]
    # A single sample may count a connection that is being closed, so the fewest later ones count.
    half = len(steady) // 2

    def grown(field: str) -> int:
        of_each = [int(getattr(s.server, field) + getattr(s.engine, field)) for s in steady]
        return max(0, min(of_each[half:]) - max(of_each[:half]))

    return Growth(
        requests=samples[-1].requests,
        slope_mb=float(slope) * 1000 / 1e6,
        files=grown("files"),
        threads=grown("threads"),
        otherwise=otherwise,
    )


def _draw(server: Server, number: int) -> int:
    side = _SIDES[number % len(_SIDES)]
    asked = {"prompt": f"a cat {number}", "num_inference_steps": 1 + number % 3}
    asked |= {"width": side, "height": side, "num_images_per_prompt": 1}
    return server.draw(asked, accept=_KINDS[number % len(_KINDS)]).status


def _sample(server: Server, requests: int) -> Sample:
    engine = int(server.metric("engine_pid"))
    return Sample(
        requests=requests,
        server=processes.usage(server.pid),
        engine=processes.usage(engine),
    )
