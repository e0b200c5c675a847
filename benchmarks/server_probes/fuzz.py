"""Send hostile requests by the thousand: no 5xx but 503, no traceback and no hang may follow.

The server accepts nothing that it could not finish within a second (`--request_timeout_s 1`), so a
reply after 2 s counts as a hang, whatever was asked. Only requests with a broken head may last
longer, because they may announce a body that never comes; the guard closes them within 10 s.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from benchmarks.server_probes import generated, mutations
from benchmarks.server_probes.fuzz_verdicts import HANG_S, UNFINISHED_S, Verdicts
from benchmarks.server_probes.outcome import Figure, ProbeOutcome
from benchmarks.server_probes.raw_client import RawClient
from benchmarks.server_probes.server import Server

OPTIONS: Final = ("--request_timeout_s", "1")
_HELD_AT_ONCE: Final = 64  # requests with broken heads


@dataclass(frozen=True, slots=True, kw_only=True)
class Amounts:
    """The number of cases from each source.

    Schemathesis adds its boundary cases to `schemathesis` examples. least: fewer cases than this in
    all mean that a source has stopped early.
    """

    bodies: int = 12_000
    heads: int = 3_000
    hypothesis: int = 3_000
    schemathesis: int = 3_000
    least: int = 20_000


FULL: Final = Amounts()
QUICK: Final = Amounts(bodies=1_500, heads=150, hypothesis=150, schemathesis=40, least=2_000)


def run(server: Server, *, amounts: Amounts = FULL, seed: int = 0) -> ProbeOutcome:
    """Send all cases to a server that was started with `OPTIONS`."""
    verdicts = Verdicts()
    _bodies(server, amounts.bodies, seed, verdicts)
    _heads(server, amounts.heads, seed, verdicts)
    if amounts.hypothesis:
        generated.random_json(server, examples=amounts.hypothesis, seed=seed, verdicts=verdicts)
    if amounts.schemathesis:
        generated.described(server, examples=amounts.schemathesis, seed=seed, verdicts=verdicts)
    return _outcome(server, verdicts, amounts.least)


def _outcome(server: Server, verdicts: Verdicts, least: int) -> ProbeOutcome:
    def none(name: str) -> Figure:
        return Figure(name=name, value=verdicts.wrong[name], at_most=0)

    return ProbeOutcome(
        probe="fuzz",
        figures=(
            Figure(name="cases", value=verdicts.cases.total(), at_least=least),
            *(Figure(name=f"cases_{name}", value=n) for name, n in verdicts.cases.items()),
            *(
                Figure(name=f"replies_{name}", value=n)
                for name, n in sorted(verdicts.statuses.items())
            ),
            *map(none, ("server_errors", "tracebacks", "hangs", "unanswered", "undescribed")),
            Figure(name="tracebacks_in_log", value=server.log.count("Traceback"), at_most=0),
            Figure(name="slowest_s", value=round(verdicts.slowest_s, 3), at_most=HANG_S),
            Figure(name="engine_restarts", value=server.metric("engine_restarts_total"), at_most=0),
            Figure(name="ping_afterwards", value=server.ping().status, at_least=200, at_most=200),
            # Schemathesis keeps some connections open, as HTTP allows.
            Figure(name="gauges_left", value=server.gauges_left(connections=16), at_most=0),
        ),
        faults=tuple(verdicts.faults),
    )


def _bodies(server: Server, count: int, seed: int, verdicts: Verdicts) -> None:
    """Send broken bodies one after the other, so that none waits for another's work."""
    generator = random.Random(seed)
    client = RawClient(server, timeout_s=5 * HANG_S)
    try:
        for _ in range(count):
            case = mutations.broken_request(generator)
            reply = client.ask(case)
            verdicts.note("bodies", case.sent, reply.status, reply.body, reply.seconds)
    finally:
        client.close()


def _heads(server: Server, count: int, seed: int, verdicts: Verdicts) -> None:
    """Send broken heads many at a time, because the server waits for those that look unfinished."""
    generator = random.Random(seed + 1)
    cases = [mutations.broken_head(generator) for _ in range(count)]

    def one(case: mutations.Case) -> None:
        client = RawClient(server, timeout_s=UNFINISHED_S + HANG_S)
        reply = client.ask(case)
        client.close()
        seconds = reply.seconds
        verdicts.note("heads", case.sent, reply.status, reply.body, seconds, unfinished=True)

    with ThreadPoolExecutor(_HELD_AT_ONCE) as clients:
        list(clients.map(one, cases))
