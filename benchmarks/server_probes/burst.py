"""Send many requests at the same moment: each must be answered or refused, and none left behind."""

from __future__ import annotations

import collections
import http.client
import threading
from concurrent.futures import ThreadPoolExecutor

from benchmarks.server_probes.outcome import Figure, ProbeOutcome
from benchmarks.server_probes.server import Reply, Server


def run(server: Server, *, requests: int = 200, steps: int = 5) -> ProbeOutcome:
    """Request `requests` pictures of `steps` steps at the same moment."""
    together = threading.Barrier(requests)

    def one(seed: int) -> Reply | str:
        together.wait()
        try:
            return server.draw({"prompt": "a cat", "num_inference_steps": steps, "seed": seed})
        except (OSError, http.client.HTTPException) as error:
            return type(error).__name__

    with ThreadPoolExecutor(requests) as clients:
        answers = list(clients.map(one, range(requests)))
    replies = [answer for answer in answers if isinstance(answer, Reply)]
    lost = collections.Counter(answer for answer in answers if isinstance(answer, str))
    statuses = collections.Counter(reply.status for reply in replies)
    refusals = [reply.seconds for reply in replies if reply.status == 503]
    return ProbeOutcome(
        probe="burst",
        figures=(
            Figure(name="requests", value=requests),
            Figure(name="answered_200", value=statuses[200], at_least=1),
            Figure(name="refused_503", value=statuses[503]),
            Figure(name="otherwise", value=requests - statuses[200] - statuses[503], at_most=0),
            Figure(name="resets", value=lost.total(), at_most=0),
            Figure(name="slowest_200_s", value=_slowest(replies, 200)),
            Figure(name="slowest_503_s", value=max(refusals, default=0.0)),
            Figure(name="gauges_left", value=server.gauges_left(), at_most=0),
        ),
        faults=tuple(f"{count} clients got {name}" for name, count in lost.items()),
    )


def _slowest(replies: list[Reply], status: int) -> float:
    return max((reply.seconds for reply in replies if reply.status == status), default=0.0)
