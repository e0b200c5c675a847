"""Collect the metrics of /metrics and write them in Prometheus' text format.

Requests and pictures are counted here; connections and the engine's gauges are read when Prometheus
scrapes the page. Our names begin with ``dreambooth_``. ``process_`` describes this process alone;
the engine's memory is ``dreambooth_engine_rss_bytes``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from dreambooth.serving.contract.reply import Picture
from dreambooth.serving.supervision.counters import SupervisorStatus

# Seconds from the end of a request's head to the end of its reply.
_BUCKETS: Final = (0.1, 0.25, 0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 45, 60, 120, 300)


class Metrics:
    """All counters of the server; `status` and `connections` are set once they can be called."""

    CONTENT_TYPE: Final = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self) -> None:
        self.status: Callable[[], SupervisorStatus] | None = None
        self.connections: Callable[[], tuple[int, Counter[str]]] | None = None
        self.dropped_lines: Callable[[], int] = lambda: 0
        self.requests: Counter[tuple[str, int]] = Counter()
        self.pictures: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self.requests_in_flight = 0
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, which nobody reads
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_DreamBoothCollector(self))
        self._seconds = Histogram(
            "dreambooth_request_seconds",
            "Seconds to answer a request for pictures with 200.",
            buckets=_BUCKETS,
            registry=self._registry,
        )
        ProcessCollector(registry=self._registry)

    @contextmanager
    def in_flight(self) -> Iterator[None]:
        """Count a request for pictures while the block runs, however it ends."""
        self.requests_in_flight += 1
        try:
            yield
        finally:
            self.requests_in_flight -= 1

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Count one request; `path` must be one of few, since each becomes a series of its own."""
        self.requests[path, status] += 1
        if path == "/invocations" and status == 200:
            self._seconds.observe(seconds)

    def refused(self, reason: str) -> None:
        """Count a request that was refused before it reached the supervisor."""
        self.refusals[reason] += 1

    def drawn(self, pictures: Sequence[Picture]) -> None:
        """Count the pictures of one request by how they ended."""
        self.pictures.update(picture.finish_reason for picture in pictures)

    def text(self) -> bytes:
        """Return the page, in version 0.0.4 of the text format."""
        return generate_latest(self._registry)


class _DreamBoothCollector(Collector):
    """Collects the counters and the supervisor's snapshot as Prometheus metric families."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        """Yield all metrics; the registry calls this for every scrape."""
        ours = self._metrics
        yield _counter(
            "requests",
            "HTTP requests by route and status; 499: the client left first.",
            ("path", "status"),
            (((path, str(status)), n) for (path, status), n in ours.requests.items()),
        )
        yield _gauge(
            "requests_in_flight",
            "Requests for pictures without an answer.",
            ours.requests_in_flight,
        )
        yield _counter(
            "pictures",
            "Pictures that were drawn for answered requests, by finish reason.",
            ("finish_reason",),
            (((reason,), n) for reason, n in ours.pictures.items()),
        )
        of_the_engine = ours.status().engine.dropped_lines_total if ours.status else 0
        yield _counter(
            "log_lines_dropped",
            "Lines of the log that nobody read.",
            (),
            (((), ours.dropped_lines() + of_the_engine),),
        )
        if ours.connections is not None:
            count, refused = ours.connections()
            yield _gauge("connections_open", "Open connections.", count)
            yield _counter(
                "connections_refused",
                "Connections closed by the guard, by reason.",
                ("reason",),
                (((reason,), n) for reason, n in refused.items()),
            )
        if ours.status is None:
            yield _gauge("ready", "1 where pictures can be asked for.", 0)
        else:
            yield from _engine_metrics(ours.status(), ours.refusals)


def _engine_metrics(status: SupervisorStatus, refused_before: Counter[str]) -> Iterator[Metric]:
    yield _gauge("ready", "1 where pictures can be asked for.", int(status.state == "ready"))
    engine = status.engine
    gauges = {
        "pictures_in_flight": (
            "Pictures accepted and not yet answered.",
            status.pictures_in_flight,
        ),
        "queued_pictures": ("Pictures that wait for a row.", engine.queued_pictures),
        "running_rows": ("U-Net rows of all pictures that take steps.", engine.running_rows),
        "engine_rss_bytes": ("Resident memory of the engine's process.", engine.rss_bytes),
        "engine_pid": ("Process id of the engine; 0 without one.", status.engine_pid or 0),
    }
    for name, (sentence, value) in gauges.items():
        yield _gauge(name, sentence, value)
    if status.load_seconds is not None:
        yield _gauge(
            "engine_load_seconds", "From the engine's start to its test.", status.load_seconds
        )
    counters = {
        "steps": (
            "Rounds with a U-Net call, each a step of every picture in it.",
            engine.calls_total,
        ),
        "engine_pictures": ("Pictures that the engine finished.", engine.pictures_total),
        "out_of_memory": ("Times that the engine ran out of memory.", engine.out_of_memory_total),
        "engine_restarts": ("Starts of the engine after the first.", status.restarts_total),
    }
    for name, (sentence, value) in counters.items():
        yield _counter(name, sentence, (), (((), value),))
    yield _counter(
        "refusals",
        "Requests that were not taken, by reason.",
        ("reason",),
        (((reason,), n + refused_before[reason]) for reason, n in status.refusals),
    )
    yield _counter(
        "losses",
        "Requests that were taken and got no pictures, by reason.",
        ("reason",),
        (((reason,), n) for reason, n in status.losses),
    )
    seconds_per_call = GaugeMetricFamily(
        "dreambooth_seconds_per_step", "Seconds of a recent U-Net call.", labels=("rows",)
    )
    for rows, seconds in engine.seconds_per_call:
        seconds_per_call.add_metric((str(rows),), seconds)
    yield seconds_per_call


def _gauge(name: str, sentence: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"dreambooth_{name}", sentence, value=value)


def _counter(
    name: str,
    sentence: str,
    labels: Sequence[str],
    values: Iterable[tuple[Sequence[str], float]],
) -> CounterMetricFamily:
    family = CounterMetricFamily(f"dreambooth_{name}", sentence, labels=labels)
    for labels_of_one, value in values:
        family.add_metric(labels_of_one, value)
    return family
