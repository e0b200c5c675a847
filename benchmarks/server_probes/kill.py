"""Kill -9 the engine under load: every request gets a reply and a new engine takes over."""

from __future__ import annotations

import collections
import http.client
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

from benchmarks.server_probes.outcome import Figure, ProbeOutcome
from benchmarks.server_probes.server import Reply, Server

REPLY_S: Final = 1.0
BACK_S: Final = 1.0  # on top of the time to load
IN_FLIGHT: Final = 16
LATE: Final = 4  # requests sent right after the kill
MOST_STEPS: Final = 200
_PING_EVERY_S: Final = 0.01


@dataclass(slots=True, kw_only=True)
class _Seen:
    """The observations of all kills."""

    statuses: collections.Counter[int] = field(default_factory=collections.Counter)
    in_flight: int = 0
    unanswered: int = 0
    slowest_reply_s: float = 0.0
    seen_down_s: float = 0.0  # until /ping answered 503
    load_s: float = 0.0  # of the slowest of the new engines
    beyond_load_s: float = 0.0  # from the kill to /ping 200, less that engine's load time
    never_down: int = 0
    flaps: int = 0  # 503, 200, 503


def run(server: Server, *, kills: int = 20, seed: int = 0) -> ProbeOutcome:
    """Kill the engine `kills` times, at random moments, with requests at different steps."""
    generator, seen = random.Random(seed), _Seen()
    restarts = server.metric("engine_restarts_total")
    for _ in range(kills):
        _one(server, generator, seen)
    after = server.draw({"prompt": "a cat", "num_inference_steps": 2}).status
    return ProbeOutcome(
        probe="kill",
        figures=(
            Figure(name="kills", value=kills),
            Figure(name="in_flight_when_killed", value=seen.in_flight),
            *(Figure(name=f"replies_{s}", value=n) for s, n in sorted(seen.statuses.items())),
            Figure(name="unanswered", value=seen.unanswered, at_most=0),
            Figure(name="slowest_reply_s", value=seen.slowest_reply_s, at_most=REPLY_S),
            Figure(name="ping_503_after_max_s", value=seen.seen_down_s, at_most=REPLY_S),
            Figure(name="kills_without_ping_503", value=seen.never_down, at_most=0),
            Figure(name="ping_200_before_ready", value=seen.flaps, at_most=0),
            Figure(name="load_max_s", value=seen.load_s),
            Figure(name="back_beyond_load_max_s", value=seen.beyond_load_s, at_most=BACK_S),
            Figure(
                name="restarts",
                value=server.metric("engine_restarts_total") - restarts,
                at_least=kills,
                at_most=kills,
            ),
            Figure(name="status_afterwards", value=after, at_least=200, at_most=200),
            Figure(name="gauges_left", value=server.gauges_left(), at_most=0),
        ),
        faults=tuple(
            f"{count} requests got status {status}"
            for status, count in seen.statuses.items()
            if status not in (200, 503)
        ),
    )


def _one(server: Server, generator: random.Random, seen: _Seen) -> None:
    steps = [generator.randint(MOST_STEPS // 2, MOST_STEPS) for _ in range(IN_FLIGHT)]
    with ThreadPoolExecutor(IN_FLIGHT + LATE) as clients:
        asked = [clients.submit(_draw, server, count) for count in steps]
        server.wait_until(lambda: server.metric("pictures_in_flight") == IN_FLIGHT, "requests")
        time.sleep(generator.uniform(0, 0.5))
        stop, pings = threading.Event(), list[Reply]()
        pinging = threading.Thread(target=_ping, args=(server, stop, pings))
        pinging.start()
        pid = int(server.metric("engine_pid"))
        seen.in_flight += int(server.metric("pictures_in_flight"))
        killed = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        asked += [clients.submit(_draw, server, 2) for _ in range(LATE)]
        replies = [one.result() for one in asked]
    try:
        server.wait_until_ready()
        time.sleep(20 * _PING_EVERY_S)
    finally:
        stop.set()
        pinging.join()
    for reply in replies:
        if reply is None:
            seen.unanswered += 1
        else:
            seen.statuses[reply.status] += 1
            seen.slowest_reply_s = max(seen.slowest_reply_s, reply.ended - killed)
    _judge_pings(pings, killed, server.metric("engine_load_seconds"), seen)


def _draw(server: Server, steps: int) -> Reply | None:
    try:
        return server.draw({"prompt": "a cat", "num_inference_steps": steps})
    except (OSError, http.client.HTTPException):
        return None


def _ping(server: Server, stop: threading.Event, replies: list[Reply]) -> None:
    while not stop.wait(_PING_EVERY_S):
        replies.append(server.ping())


def _judge_pings(pings: list[Reply], killed: float, load_s: float, seen: _Seen) -> None:
    after = [ping for ping in pings if ping.ended > killed]
    down = [i for i, ping in enumerate(after) if ping.status == 503]
    if not down:
        seen.never_down += 1
        return
    seen.seen_down_s = max(seen.seen_down_s, after[down[0]].ended - killed)
    seen.flaps += down != list(range(down[0], down[-1] + 1))
    back = [ping.ended for ping in after[down[-1] :] if ping.status == 200]
    back_s = back[0] - killed if back else float("inf")
    seen.load_s = max(seen.load_s, load_s)
    seen.beyond_load_s = max(seen.beyond_load_s, back_s - load_s)
