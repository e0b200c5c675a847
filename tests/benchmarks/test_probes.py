"""Small forms of the server probes, run against real servers.

Their times are only judged by the benchmark command.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator

import pytest

from benchmarks import probes
from benchmarks.__main__ import parser
from benchmarks.server_probes import (
    burst,
    few_files,
    fuzz,
    generated,
    half_open,
    kill,
    leaky_server,
    leave,
    mutations,
    overhead,
    processes,
    sigterm,
    soak,
)
from benchmarks.server_probes.fuzz_verdicts import HANG_S, TRACEBACK, Verdicts
from benchmarks.server_probes.outcome import Figure, ProbeOutcome, percentile
from benchmarks.server_probes.processes import Usage
from benchmarks.server_probes.server import Server, start
from benchmarks.server_probes.soak import Sample
from dreambooth.serving.contract import openapi

GENEROUS_S = 120.0  # only guards against a hang


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Yield a server with a long time limit that is timed; the last test ends it."""
    with start("tiny", *probes.PATIENT, program=overhead.PROGRAM) as patient:
        yield patient


def assert_sound(outcome: ProbeOutcome) -> None:
    """Assert that all bounds are kept; of times, only that nothing hung."""
    for figure in outcome.figures:
        if figure.name.endswith(("_s", "_ms")):
            assert figure.value < GENEROUS_S * (1000 if figure.name.endswith("_ms") else 1), figure
        else:
            assert figure.holds, (figure, outcome)
    assert outcome.faults == ()


def test_hostile_requests() -> None:
    amounts = fuzz.Amounts(bodies=150, heads=12, hypothesis=25, schemathesis=1, least=300)
    with start("tiny", *fuzz.OPTIONS) as server:
        outcome = fuzz.run(server, amounts=amounts, seed=0)
    failed = [fault for fault in outcome.failed if "hangs" not in fault and "_s is" not in fault]
    assert failed == []  # a busy machine may be late
    assert outcome.value("cases_bodies") == 150
    assert outcome.value("cases_schemathesis") > 100
    assert outcome.value("replies_400") > 50


@pytest.mark.on_demand
def test_half_open_connections(server: Server) -> None:
    outcome = half_open.run(server, half_open=40, dripping=10)
    assert_sound(outcome)
    assert outcome.value("answered_408") == 30
    assert outcome.value("counted_by_guard") == 50


@pytest.mark.on_demand
def test_few_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_files, "OPEN_FILES", (64,))
    outcome = few_files.run("tiny", connections=100, times=1)
    assert_sound(outcome)
    assert outcome.value("files_64_pictures") == 1


@pytest.mark.on_demand
def test_a_burst(server: Server) -> None:
    outcome = burst.run(server, requests=80, steps=1)
    assert_sound(outcome)
    assert outcome.value("answered_200") + outcome.value("refused_503") == 80


@pytest.mark.on_demand
def test_overhead_beside_the_engine(server: Server) -> None:
    outcome = overhead.measure(server, requests=3)
    assert_sound(outcome)
    assert 0 < outcome.value("own_size_p50_ms") <= outcome.value("own_size_p99_ms")


@pytest.mark.on_demand
def test_clients_that_leave(server: Server) -> None:
    outcome = leave.run(server, clients=8, longest_s=1.0)
    assert_sound(outcome)
    assert outcome.value("cancelled") == 8


@pytest.mark.on_demand
def test_a_soak(server: Server) -> None:
    seen = soak.soak(server, seconds=0, batch=2)
    assert (seen.requests, seen.otherwise) == (20, 0)


@pytest.mark.on_demand
def test_a_killed_engine(server: Server) -> None:
    outcome = kill.run(server, kills=1)
    assert_sound(outcome)
    assert outcome.value("replies_503") >= 1


@pytest.mark.on_demand
def test_sigterm_under_load(server: Server) -> None:
    seen = sigterm.Seen()
    sigterm.one_round(server, random.Random(0), seen)
    assert_sound(sigterm.outcome(seen, 1))
    assert not processes.descendants(server.pid)


# The rules by which the probes judge.


def sample(requests: int, mb: float, files: int = 20) -> Sample:
    server = Usage(rss_bytes=int((100 + mb) * 1e6), files=files, threads=8)
    engine = Usage(rss_bytes=500_000_000, files=9, threads=5)
    return Sample(requests=requests, server=server, engine=engine)


def test_growth_is_seen_in_memory_and_in_files_and_not_in_noise_or_in_the_warm_up() -> None:
    noise = random.Random(0)
    steady = [
        sample(n, min(n, 2_000) / 50 + noise.random(), files=20 + n % 3)
        for n in range(100, 10_000, 100)
    ]
    assert abs(soak.growth(steady).slope_mb) < 0.1
    assert (soak.growth(steady).files, soak.growth(steady).threads) == (0, 0)
    assert not soak.growth(steady).leaks
    leaking = [
        sample(n, n / 500 + noise.random(), files=20 + n // 100) for n in range(0, 9_000, 90)
    ]
    seen = soak.growth(leaking)
    assert seen.slope_mb == pytest.approx(2, rel=0.1)
    assert seen.leaks
    assert seen.files > 0
    assert soak.outcome(soak.growth(steady), soak.growth(steady), 0).failed == (
        "planted_leak_caught is 0, not >= 1",
    )
    assert soak.outcome(soak.growth(steady), seen, 0).failed == ()


def test_the_planted_leak_keeps_every_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bytes] = []
    monkeypatch.setattr(leaky_server, "_KEPT", kept)
    monkeypatch.setattr(leaky_server, "_encode", lambda *_, **__: (b"a reply", "image/png"))
    assert leaky_server._encode_and_keep() == (b"a reply", "image/png")
    assert kept == [b"a reply"]


@pytest.mark.parametrize(
    ("status", "body", "seconds", "unfinished", "kind"),
    [
        (500, b"", 0.1, False, "server_errors"),
        (507, b"", 0.1, True, "server_errors"),
        (400, b"..." + TRACEBACK, 0.1, False, "tracebacks"),
        (200, b"", HANG_S + 1, False, "hangs"),
        (400, b"", HANG_S + 1, True, "hangs"),
        (None, b"", 11.0, True, "hangs"),
        (None, b"", 0.1, False, "unanswered"),
    ],
)
def test_what_must_not_be_is_counted_and_reported(
    status: int | None, body: bytes, seconds: float, unfinished: bool, kind: str
) -> None:
    verdicts = Verdicts()
    verdicts.note("bodies", b"sent", status, body, seconds, unfinished=unfinished)
    assert dict(verdicts.wrong) == {kind: 1}
    assert "b'sent'" in verdicts.faults[0]


@pytest.mark.parametrize(("status", "seconds"), [(408, 9.1), (None, 9.1), (503, 0.1), (200, 1.9)])
def test_what_may_be_is_no_fault(status: int | None, seconds: float) -> None:
    verdicts = Verdicts()
    verdicts.note("heads", b"sent", status, b"", seconds, unfinished=True)
    assert verdicts.faults == []
    assert verdicts.cases.total() == 1


def test_the_same_seed_makes_the_same_cases() -> None:
    for make in (mutations.broken_request, mutations.broken_head):
        twice = [[make(random.Random(seed)) for seed in range(50)] for _ in range(2)]
        assert twice[0] == twice[1]
        assert len({case.sent for case in twice[0]}) > 30


def test_good_requests_are_made_small() -> None:
    smaller = generated.bounded(openapi.document())["components"]["schemas"]
    for key, most in (("width", 64), ("height", 64), ("num_inference_steps", 2)):
        assert smaller["Parameters"]["properties"][key]["maximum"] == most
        place = {"$ref": f"#/components/schemas/Parameters/properties/{key}"}
        assert smaller["JsonRequest"]["properties"][key] == place
    for name in ("JsonRequest", "Parameters"):
        assert "num_inference_steps" in smaller[name]["required"]
    assert openapi.document()["components"]["schemas"]["Parameters"] != smaller["Parameters"]


def test_a_figure_says_whether_it_is_within_its_bound() -> None:
    assert Figure(name="resets", value=0, at_most=0).holds
    assert not Figure(name="resets", value=1, at_most=0).holds
    assert not Figure(name="caught", value=0, at_least=1).holds
    assert not Figure(name="ping_ms", value=math.nan, at_most=1).holds
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile([float(i) for i in range(1, 101)], 99) == 99.0
    assert math.isnan(percentile([], 99))


def test_the_last_line_is_json_and_a_broken_bar_is_exit_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = (Figure(name="resets", value=2, at_most=0), Figure(name="slowest_s", value=0.25))
    seen = ProbeOutcome(
        probe="burst", figures=figures, faults=("2 clients got ConnectionResetError",)
    )
    monkeypatch.setitem(probes.PROBES, "burst", lambda size: seen)
    assert probes.main(parser().parse_args(["probes", "--only", "burst"])) == 1
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["benchmark"] == "probes"
    assert summary["figures"] == {"burst": {"resets": 2, "slowest_s": 0.25}}
    assert summary["failed"] == [
        "burst: resets is 2, not <= 0",
        "burst: 2 clients got ConnectionResetError",
    ]
