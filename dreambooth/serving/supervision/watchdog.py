"""Decide when an engine counts as hanging, by arithmetic without a clock or a process."""

from __future__ import annotations

from dataclasses import dataclass

from dreambooth.serving.contract.engine_status import EngineStatus
from dreambooth.serving.supervision.messages import FromEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTimeouts:
    """The time limits of an engine; all are generous, since killing a slow engine helps nobody.

    silence_s: without any message, until it is killed; a thread of its own sends one twice a
    second, whatever the engine does. quiet_s: without any message, until an engine that was ready
    gets no more requests; it may recover. step_s: without progress (a U-Net call or a decoded
    picture) while it has work; a step of a full-size model on a CPU takes tens of seconds. load_s:
    from its start until it is ready.
    """

    silence_s: float = 60.0
    quiet_s: float = 10.0
    step_s: float = 300.0
    load_s: float = 900.0


class Watchdog:
    """Watches one engine process; all times are seconds of one monotonic clock."""

    def __init__(self, timeouts: EngineTimeouts, now: float) -> None:
        self._timeouts = timeouts
        self._step_s = timeouts.step_s
        self._started = now
        self._last_message = now
        self._progress = now
        self._counted = (0, 0)
        self._ready = False
        self._busy = False

    def ready(self, now: float) -> None:
        """Note that the engine is loaded."""
        self._ready = True
        self._progress = now

    def allow(self, step_s: float) -> None:
        """Let a step take `step_s` seconds, if that is longer, until the engine is idle."""
        self._step_s = max(self._step_s, step_s)

    def received(self, now: float, message: FromEngine) -> None:
        """Note a message, and if it is a status whether the work makes progress."""
        self._last_message = now
        if not isinstance(message, EngineStatus):
            return
        counted = (message.calls_total, message.pictures_total)
        idle = not (message.running_rows or message.queued_pictures or message.undecoded)
        self._busy = not idle
        if idle:
            self._step_s = self._timeouts.step_s
        if idle or counted != self._counted:
            self._progress = now
        self._counted = counted

    def exclude(self, seconds: float) -> None:
        """Do not count `seconds` during which this process itself was blocked."""
        self._started += seconds
        self._last_message += seconds
        self._progress += seconds

    def quiet(self, now: float) -> bool:
        """Return whether an engine that was ready has sent nothing for `quiet_s`."""
        return self._ready and now - self._last_message > self._timeouts.quiet_s

    def overdue(self, now: float) -> str | None:
        """Return a clause that says what is overdue, or None."""
        if now - self._last_message > self._timeouts.silence_s:
            return f"it gave no sign of life for {self._timeouts.silence_s:g} s"
        if not self._ready:
            late = now - self._started > self._timeouts.load_s
            return f"it was not ready within {self._timeouts.load_s:g} s" if late else None
        if self._busy and now - self._progress > self._step_s:
            return f"it has work but finished no step within {self._step_s:g} s"
        return None
