"""Let clients leave at random moments: the engine must stop their work within one U-Net call.

A request asks for several large pictures, so that a U-Net call takes longer than /metrics takes to
show a change: the engine sends its status as soon as a request ends.
"""

from __future__ import annotations

import json
import random
import threading
import time
from typing import Final

from benchmarks.server_probes.outcome import Figure, ProbeOutcome
from benchmarks.server_probes.server import JSON, JSON_JPEG, Server

WAVE: Final = 10  # clients at a time
_TOLD_S: Final = 0.06  # three times the engine's shortest wait between two statuses
_ASKED: Final = {
    "prompt": "a cat",
    "num_inference_steps": 200,
    "width": 128,
    "height": 128,
    "num_images_per_prompt": 4,
}


def run(
    server: Server, *, clients: int = 200, longest_s: float = 2.0, seed: int = 0
) -> ProbeOutcome:
    """Send requests in waves; each client leaves within `longest_s`; count the U-Net calls after
    that.
    """
    generator = random.Random(seed)
    before = server.metrics()
    calls_after: list[int] = []
    freed: list[float] = []
    waves = [WAVE] * (clients // WAVE) + [clients % WAVE] * bool(clients % WAVE)
    for wave in waves:
        _one_wave(server, [generator.uniform(0, longest_s) for _ in range(wave)])
        left = time.monotonic()
        server.wait_until(
            lambda: server.metric("requests_in_flight") == 0, "no request", check_interval_s=0
        )
        time.sleep(_TOLD_S)
        at_once = server.metric("steps_total")
        server.wait_until(
            lambda: server.metric("running_rows") == 0, "no work", check_interval_s=0.005
        )
        freed.append(time.monotonic() - left)
        time.sleep(max(1.0, 3 * _seconds_per_call(server)))
        calls_after.append(int(server.metric("steps_total") - at_once))
    after = server.metrics()

    def grown(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    return ProbeOutcome(
        probe="leave",
        figures=(
            Figure(name="clients", value=clients),
            Figure(name="cancelled", value=grown('losses_total{reason="cancelled"}'), at_least=1),
            Figure(name="calls_begun", value=grown("steps_total"), at_least=1),
            Figure(name="calls_after_leaving_max", value=max(calls_after), at_most=1),
            Figure(name="gauges_zero_max_s", value=max(freed)),
            Figure(name="gauges_left", value=server.gauges_left(), at_most=0),
        ),
    )


def _one_wave(server: Server, stays_s: list[float]) -> None:
    """Send all requests of a wave at once; each client leaves after its time without reading."""
    body = json.dumps(_ASKED).encode()
    head = f"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: {JSON}\r\n"
    head += f"Accept: {JSON_JPEG}\r\nContent-Length: {len(body)}\r\n\r\n"

    def one(stay_s: float) -> None:
        with server.connect(head.encode() + body):
            time.sleep(stay_s)

    clients = [threading.Thread(target=one, args=(stay_s,)) for stay_s in stays_s]
    for client in clients:
        client.start()
    for client in clients:
        client.join()


def _seconds_per_call(server: Server) -> float:
    """Return the seconds of the slowest recent U-Net call, scaled to our size.

    The metric is for the embedded model's own size, a quarter of ours.
    """
    found = [n for name, n in server.metrics().items() if name.startswith("seconds_per_call")]
    return 4 * max(found, default=0.0)
