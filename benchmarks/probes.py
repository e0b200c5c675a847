"""Stress the real server in every way we know and measure how it copes: one probe per way.

Each probe starts servers of its own: `python -m dreambooth serve` or a program that wraps it, on
the given model and with the default options, except that some probes set another time limit for a
request.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.server_probes import (
    burst,
    few_files,
    fuzz,
    half_open,
    kill,
    leave,
    overhead,
    sigterm,
    soak,
)
from benchmarks.server_probes.outcome import ProbeOutcome
from benchmarks.server_probes.server import start

QUICK_SOAK_MINUTES = 0.5
# For requests that a probe interrupts: none is refused for the time that it would take.
PATIENT = ("--request_timeout_s", "86400")


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """The size of a run: the model, and how much each probe does."""

    model: str
    quick: bool
    seed: int
    soak_minutes: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose the probes and say how much each of them does."""
    parser.add_argument("--only", nargs="+", choices=PROBES, metavar="NAME", help=", ".join(PROBES))
    parser.add_argument("--quick", action="store_true", help="a small form of each probe")
    parser.add_argument("--model", default="tiny", help="as `serve` takes it (default: tiny)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    parser.add_argument(
        *("--soak_minutes", "--soak-minutes"),
        type=float,
        default=0.0,
        help="soak for so long; it is left out without (default: 0)",
    )


def main(arguments: argparse.Namespace) -> int:
    """Run the probes, print the table and the JSON line; return 1 if anything failed."""
    minutes = arguments.soak_minutes
    names = arguments.only or [name for name in PROBES if name != "soak" or minutes > 0]
    if "soak" in names and not minutes > 0:
        minutes = QUICK_SOAK_MINUTES
    size = Size(
        model=arguments.model, quick=arguments.quick, seed=arguments.seed, soak_minutes=minutes
    )
    began = time.monotonic()
    outcomes = []
    for name in names:
        begun = time.monotonic()
        outcomes.append(PROBES[name](size))
        _print(outcomes[-1], time.monotonic() - begun)
    failed = sum(len(outcome.failed) for outcome in outcomes)
    print(json.dumps(_summary(size, outcomes, time.monotonic() - began)), flush=True)
    return 1 if failed else 0


def _print(outcome: ProbeOutcome, seconds: float) -> None:
    print(f"\n{outcome.probe} ({seconds:.0f} s)")
    for figure in outcome.figures:
        verdict = "" if figure.holds else "  FAILED"
        print(f"  {figure.name:<36}{figure.value:>12g}  {figure.bar}{verdict}")
    for fault in outcome.faults:
        print(f"  FAULT: {fault}")


def _summary(size: Size, outcomes: list[ProbeOutcome], seconds: float) -> dict[str, object]:
    return {
        "benchmark": "probes",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "model": size.model,
        "quick": size.quick,
        "seconds": round(seconds, 1),
        "failed": [f"{outcome.probe}: {fault}" for outcome in outcomes for fault in outcome.failed],
        "figures": {
            outcome.probe: {figure.name: _rounded(figure.value) for figure in outcome.figures}
            for outcome in outcomes
        },
    }


def _rounded(value: float) -> float:
    return int(value) if float(value).is_integer() else float(f"{value:.4g}")


def _fuzz(size: Size) -> ProbeOutcome:
    with start(size.model, *fuzz.OPTIONS) as server:
        amounts = fuzz.QUICK if size.quick else fuzz.FULL
        return fuzz.run(server, amounts=amounts, seed=size.seed)


def _half_open(size: Size) -> ProbeOutcome:
    with start(size.model) as server:
        if size.quick:
            return half_open.run(server, half_open=100, dripping=20)
        return half_open.run(server)


def _few_files(size: Size) -> ProbeOutcome:
    return few_files.run(size.model, connections=300 if size.quick else 2_000)


def _burst(size: Size) -> ProbeOutcome:
    with start(size.model) as server:
        return burst.run(server, requests=60 if size.quick else 200)


def _overhead(size: Size) -> ProbeOutcome:
    return overhead.run(size.model, requests=30 if size.quick else 300)


def _leave(size: Size) -> ProbeOutcome:
    with start(size.model, *PATIENT) as server:
        return leave.run(server, clients=20 if size.quick else 200, seed=size.seed)


def _kill(size: Size) -> ProbeOutcome:
    with start(size.model, *PATIENT) as server:
        return kill.run(server, kills=2 if size.quick else 20, seed=size.seed)


def _sigterm(size: Size) -> ProbeOutcome:
    return sigterm.run(size.model, rounds=1 if size.quick else 5, seed=size.seed)


def _soak(size: Size) -> ProbeOutcome:
    return soak.run(size.model, minutes=size.soak_minutes)


PROBES: dict[str, Callable[[Size], ProbeOutcome]] = {
    "fuzz": _fuzz,
    "half_open": _half_open,
    "few_files": _few_files,
    "burst": _burst,
    "overhead": _overhead,
    "leave": _leave,
    "kill": _kill,
    "sigterm": _sigterm,
    "soak": _soak,
}
