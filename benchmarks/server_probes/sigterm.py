"""Send SIGTERM under load: accepted requests are drawn and sent, then all processes end."""

from __future__ import annotations

import collections
import contextlib
import http.client
import random
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

from benchmarks.server_probes import processes
from benchmarks.server_probes.outcome import Figure, ProbeOutcome
from benchmarks.server_probes.server import STOP_S, ProbeError, Reply, Server, start

ACCEPTED: Final = 32
NEWCOMERS: Final = 4  # clients that keep asking all the time
MOST_STEPS: Final = 20
WORK_S: Final = 8.0  # about what the accepted pictures take one by one; 25 s are allowed


@dataclass(slots=True, kw_only=True)
class Seen:
    """The observations of all rounds."""

    accepted: int = 0
    accepted_statuses: collections.Counter[int] = field(default_factory=collections.Counter)
    resets: int = 0
    before: collections.Counter[str] = field(default_factory=collections.Counter)
    after: collections.Counter[str] = field(default_factory=collections.Counter)
    slowest_exit_s: float = 0.0
    bad_exits: int = 0
    orphans: int = 0


def run(model: str, *, rounds: int = 5, seed: int = 0) -> ProbeOutcome:
    """Start a server and stop it under load, `rounds` times."""
    seen = Seen()
    for i in range(rounds):
        with start(model) as server:
            one_round(server, random.Random(seed + i), seen)
    return outcome(seen, rounds)


def outcome(seen: Seen, rounds: int) -> ProbeOutcome:
    """Return the figures with their bounds."""
    others = seen.accepted - seen.accepted_statuses[200]
    return ProbeOutcome(
        probe="sigterm",
        figures=(
            Figure(name="rounds", value=rounds),
            Figure(name="accepted", value=seen.accepted, at_least=rounds),
            Figure(name="accepted_without_200", value=others, at_most=0),
            Figure(name="resets_of_accepted", value=seen.resets, at_most=0),
            *(
                Figure(name=f"sent_before_{what}", value=count)
                for what, count in sorted(seen.before.items())
            ),
            Figure(name="sent_before_reset", value=seen.before["reset"], at_most=0),
            *(
                Figure(name=f"sent_after_{what}", value=count)
                for what, count in sorted(seen.after.items())
            ),
            Figure(name="exit_codes_not_0", value=seen.bad_exits, at_most=0),
            Figure(name="slowest_exit_s", value=seen.slowest_exit_s, at_most=STOP_S),
            Figure(name="orphans", value=seen.orphans, at_most=0),
        ),
    )


def one_round(server: Server, generator: random.Random, seen: Seen) -> None:
    """Fill the queue, send the signal, and look at every reply and process."""
    stop, newcomers = threading.Event(), list[tuple[float, str]]()
    most_steps = _affordable_steps(server)
    steps = [generator.randint(1, most_steps) for _ in range(ACCEPTED)]
    with ThreadPoolExecutor(ACCEPTED + NEWCOMERS) as clients:
        before = _taken(server)
        asked = [clients.submit(_draw, server, count) for count in steps]
        server.wait_until(
            lambda: _taken(server) - before >= ACCEPTED, "requests", check_interval_s=0.005
        )
        coming = [clients.submit(_come, server, stop, newcomers) for _ in range(NEWCOMERS)]
        time.sleep(generator.uniform(0, 0.2))
        family = processes.descendants(server.pid)
        signalled = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.process.wait(STOP_S)
        seen.slowest_exit_s = max(seen.slowest_exit_s, time.monotonic() - signalled)
        seen.bad_exits += server.process.poll() != 0
        stop.set()
        for newcomer in coming:
            newcomer.result()
        replies = [one.result() for one in asked]
    seen.accepted += len(replies)
    seen.accepted_statuses.update(reply.status for reply in replies if reply is not None)
    seen.resets += replies.count(None)
    for sent, what in newcomers:
        (seen.before if sent < signalled else seen.after)[what] += 1
    seen.orphans += sum(process.lives for process in family)


def _affordable_steps(server: Server) -> int:
    alone = _draw(server, MOST_STEPS)
    if alone is None:
        raise ProbeError("The server did not answer before the signal.")
    seconds_per_call = alone.seconds / MOST_STEPS
    return max(2, min(MOST_STEPS, int(2 * WORK_S / ACCEPTED / seconds_per_call)))


def _taken(server: Server) -> float:
    """Return how many requests the server has accepted: in progress, or answered with 200."""
    now = server.metrics()
    answered = now.get('requests_total{path="/invocations",status="200"}', 0.0)
    return now["requests_in_flight"] + answered


def _draw(server: Server, steps: int) -> Reply | None:
    try:
        return server.draw({"prompt": "a cat", "num_inference_steps": steps})
    except (OSError, http.client.HTTPException):
        return None


def _come(server: Server, stop: threading.Event, newcomers: list[tuple[float, str]]) -> None:
    """Send one-step requests again and again; note when each was sent and what came of it."""
    while not stop.wait(0.02):
        sent = time.monotonic()
        try:
            reply = server.draw({"prompt": "a cat", "num_inference_steps": 1})
            newcomers.append((sent, str(reply.status)))
        except ConnectionRefusedError:
            newcomers.append((sent, "refused"))
            return
        except (OSError, http.client.HTTPException):
            newcomers.append((sent, "reset"))
