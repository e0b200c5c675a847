"""Name what the supervisor counts, and define the snapshot of its state and counters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dreambooth.serving.contract.engine_status import EngineStatus

State = Literal["loading", "ready", "down", "closing"]
# Why a request was refused: one of three states, a full queue, a deadline that cannot be met now,
# or ("never") more pictures or more time than even an idle server allows.
RefusalReason = Literal["loading", "down", "closing", "queue", "deadline", "never"]
# Why an accepted request got no pictures: the engine's process died, it was late, its client left,
# the engine reported an error (out of memory, a fault of ours), or the server was stopped.
LossReason = Literal["engine_died", "late", "cancelled", "engine_error", "closing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisorStatus:
    """A snapshot for /ping and /metrics; the *_total never fall, even when the engine restarts.

    reason: why the state is not "ready", one sentence, else "". requests_in_flight and
    pictures_in_flight: accepted and not yet answered. refusals and losses: (reason, count), every
    reason present. load_seconds: how long the engine took from its start until it was ready, None
    before the first. engine: its last status, at most about half a second old, the gauges 0 without
    an engine, the counters summed up over all its processes.
    """

    state: State
    reason: str
    requests_in_flight: int
    pictures_in_flight: int
    restarts_total: int
    refusals: tuple[tuple[RefusalReason, int], ...]
    losses: tuple[tuple[LossReason, int], ...]
    load_seconds: float | None
    engine_pid: int | None
    engine: EngineStatus
