"""Keep the supervisor's counters across restarts of the engine, and take snapshots of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from dreambooth.serving.supervision.messages import Status

State = Literal["loading", "ready", "down", "closing"]
# Why a request was refused: one of three states, a full queue, a deadline that cannot be met now,
# or ("never") more pictures or more time than even an idle server allows.
RefusalReason = Literal["loading", "down", "closing", "queue", "deadline", "never"]
REFUSAL_REASONS: tuple[RefusalReason, ...] = (
    *("loading", "down", "closing"),
    *("queue", "deadline", "never"),
)
# Why an accepted request got no pictures: the engine's process died, it was late, its client left,
# the engine reported an error (out of memory, a fault of ours), or the server was stopped.
LossReason = Literal["engine_died", "late", "cancelled", "engine_error", "closing"]
LOSS_REASONS: tuple[LossReason, ...] = (
    *("engine_died", "late", "cancelled"),
    *("engine_error", "closing"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisorStatus:
    """A snapshot for /ping and /metrics; the *_total never fall, even when the engine restarts.

    reason: why the state is not "ready", one sentence, else "". requests_in_flight and
    pictures_in_flight: accepted and not yet answered. queued_pictures and running_rows: from the
    engine's last Status, which is at most about half a second old; 0 without an engine.
    seconds_per_call: (rows, seconds) of recent U-Net calls. load_seconds: how long the engine took
    from its start until it was ready, None before the first. refusals and losses: (reason, count),
    every reason present.
    """

    state: State
    reason: str
    requests_in_flight: int
    pictures_in_flight: int
    queued_pictures: int
    running_rows: int
    calls_total: int
    pictures_total: int
    out_of_memory_total: int
    dropped_lines_total: int
    restarts_total: int
    refusals: tuple[tuple[RefusalReason, int], ...]
    losses: tuple[tuple[LossReason, int], ...]
    seconds_per_call: tuple[tuple[int, float], ...]
    load_seconds: float | None
    engine_pid: int | None
    engine_rss_bytes: int


class Counters:
    """The counters of one supervisor; those of the engine's processes are summed up."""

    def __init__(self) -> None:
        self.refusals: Counter[RefusalReason] = Counter(dict.fromkeys(REFUSAL_REASONS, 0))
        self.losses: Counter[LossReason] = Counter(dict.fromkeys(LOSS_REASONS, 0))
        self._ended = Status()  # sums over the processes that have ended
        self.engine = Status()

    def engine_ended(self) -> None:
        """Keep the counters of a process that has ended, and set its gauges to 0."""
        self._ended = self._sum()
        self.engine = Status()

    def _sum(self) -> Status:
        return Status(
            calls_total=self._ended.calls_total + self.engine.calls_total,
            pictures_total=self._ended.pictures_total + self.engine.pictures_total,
            out_of_memory_total=self._ended.out_of_memory_total + self.engine.out_of_memory_total,
            dropped_lines_total=self._ended.dropped_lines_total + self.engine.dropped_lines_total,
        )

    def snapshot(
        self,
        *,
        state: State,
        reason: str,
        requests_in_flight: int,
        pictures_in_flight: int,
        restarts_total: int,
        load_seconds: float | None,
        engine_pid: int | None,
    ) -> SupervisorStatus:
        """Return the counters together with the supervisor's own state."""
        total = self._sum()
        return SupervisorStatus(
            state=state,
            reason=reason,
            requests_in_flight=requests_in_flight,
            pictures_in_flight=pictures_in_flight,
            queued_pictures=self.engine.queued_pictures,
            running_rows=self.engine.running_rows,
            calls_total=total.calls_total,
            pictures_total=total.pictures_total,
            out_of_memory_total=total.out_of_memory_total,
            dropped_lines_total=total.dropped_lines_total,
            restarts_total=restarts_total,
            refusals=tuple(self.refusals.items()),
            losses=tuple(self.losses.items()),
            seconds_per_call=self.engine.seconds_per_call,
            load_seconds=load_seconds,
            engine_pid=engine_pid,
            engine_rss_bytes=self.engine.rss_bytes,
        )
