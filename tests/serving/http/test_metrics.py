from __future__ import annotations

from collections import Counter
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dreambooth.serving.contract.engine_status import EngineStatus
from dreambooth.serving.contract.reply import Picture
from dreambooth.serving.http.metrics import Metrics
from dreambooth.serving.supervision.counters import SupervisorStatus


def samples(metrics: Metrics) -> dict[str, float]:
    """Return every sample by name{label=value}, as Prometheus' own parser reads the page."""
    found = {}
    for family in text_string_to_metric_families(metrics.text().decode()):
        assert family.documentation
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sample.labels.items())
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def status() -> SupervisorStatus:
    nothing: dict[str, Any] = dict.fromkeys((f.name for f in fields(SupervisorStatus)), 0)
    known = {
        "state": "ready",
        "pictures_in_flight": 6,
        "restarts_total": 2,
        "refusals": (("deadline", 5), ("loading", 0)),
        "losses": (("engine_died", 1),),
        "load_seconds": 1.5,
        "engine_pid": 4711,
        "engine": EngineStatus(
            queued_pictures=3,
            running_rows=4,
            calls_total=100,
            pictures_total=9,
            out_of_memory_total=8,
            dropped_lines_total=20,
            seconds_per_call=((1, 0.25), (4, 0.5)),
            rss_bytes=1000,
        ),
    }
    return SupervisorStatus(**nothing | known)


def test_what_the_supervisor_knows_is_on_the_page() -> None:
    metrics = Metrics()
    metrics.status = status
    metrics.connections = lambda: (12, Counter({"slow head": 7}))
    metrics.refused("loading")
    metrics.dropped_lines = lambda: 1
    found = samples(metrics)
    expected = {
        "dreambooth_ready": 1,
        "dreambooth_queued_pictures": 3,
        "dreambooth_pictures_in_flight": 6,
        "dreambooth_running_rows": 4,
        "dreambooth_steps_total": 100,
        "dreambooth_engine_pictures_total": 9,
        "dreambooth_engine_restarts_total": 2,
        "dreambooth_engine_pid": 4711,
        "dreambooth_engine_rss_bytes": 1000,
        "dreambooth_engine_load_seconds": 1.5,
        "dreambooth_out_of_memory_total": 8,
        "dreambooth_log_lines_dropped_total": 21,
        "dreambooth_refusals_total{reason=deadline}": 5,
        "dreambooth_refusals_total{reason=loading}": 1,
        "dreambooth_losses_total{reason=engine_died}": 1,
        "dreambooth_seconds_per_step{rows=4}": 0.5,
        "dreambooth_connections_open": 12,
        "dreambooth_connections_refused_total{reason=slow head}": 7,
        "dreambooth_requests_in_flight": 0,
    }
    assert {name: found[name] for name in expected} == expected
    assert not [name for name in found if "_created" in name]


def test_requests_and_pictures_are_counted_by_how_they_ended() -> None:
    metrics = Metrics()
    pixels = np.zeros((8, 8, 3), np.uint8)
    metrics.drawn([Picture(pixels=pixels, seed=0, finish_reason="SUCCESS")] * 2)
    metrics.drawn([Picture(pixels=pixels, seed=0, finish_reason="BLACK")])
    metrics.answered("/invocations", 200, 2.5)
    metrics.answered("/invocations", 200, 400.0)
    metrics.answered("/invocations", 503, 0.1)
    metrics.answered("/ping", 200, 0.001)
    found = samples(metrics)
    assert found["dreambooth_pictures_total{finish_reason=SUCCESS}"] == 2
    assert found["dreambooth_pictures_total{finish_reason=BLACK}"] == 1
    assert found["dreambooth_requests_total{path=/invocations,status=200}"] == 2
    assert found["dreambooth_requests_total{path=/invocations,status=503}"] == 1
    assert found["dreambooth_request_seconds_count"] == 2
    assert found["dreambooth_request_seconds_bucket{le=3.0}"] == 1
    assert found["dreambooth_request_seconds_sum"] == 402.5
    assert found["dreambooth_ready"] == 0, "nobody can be asked yet"


def test_the_gauge_of_requests_in_flight_returns_to_0_however_they_end() -> None:
    metrics = Metrics()
    with metrics.in_flight(), metrics.in_flight():
        assert samples(metrics)["dreambooth_requests_in_flight"] == 2
    with pytest.raises(KeyError), metrics.in_flight():
        raise KeyError
    assert samples(metrics)["dreambooth_requests_in_flight"] == 0


def test_this_process_is_on_the_page() -> None:
    found = samples(Metrics())
    assert found["process_open_fds"] > 0
    assert found["process_resident_memory_bytes"] > 1e6
