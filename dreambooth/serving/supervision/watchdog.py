"""When a silent engine counts as wedged: arithmetic on signs of life, no clock and no process."""

from __future__ import annotations

from dataclasses import dataclass

from dreambooth.serving.supervision.messages import FromEngine, Status


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long the engine may take; all generous, since killing a slow engine helps nobody.

    silence_s: without any message; a thread of its own sends one twice a second, whatever the
    engine does. quiet_s: the same of one that was ready, until it is no longer asked for pictures:
    it may come back. step_s: without progress while it has work: one U-Net call or one decoding; a
    step of a full-size model on a CPU takes tens of seconds. load_s: until it is ready.
    """

    silence_s: float = 60.0
    quiet_s: float = 10.0
    step_s: float = 300.0
    load_s: float = 900.0


class Watchdog:
    """Judges one engine process; all times are of one monotonic clock, in seconds."""

    def __init__(self, patience: Patience, now: float) -> None:
        self._patience = patience
        self._step_s = patience.step_s
        self._started = now
        self._last_message = now
        self._progress = now
        self._counted = (0, 0)
        self._ready = False
        self._busy = False

    def ready(self, now: float) -> None:
        """The engine is loaded."""
        self._ready = True
        self._progress = now

    def allow(self, step_s: float) -> None:
        """Let steps take so long until the engine has nothing to do, if that is longer."""
        self._step_s = max(self._step_s, step_s)

    def received(self, now: float, message: FromEngine) -> None:
        """Note a message, and from a Status whether work goes on."""
        self._last_message = now
        if not isinstance(message, Status):
            return
        counted = (message.steps_done_total, message.pictures_total)
        idle = not (message.running_rows or message.queued_pictures or message.undecoded)
        self._busy = not idle
        if idle:
            self._step_s = self._patience.step_s
        if idle or counted != self._counted:
            self._progress = now
        self._counted = counted

    def exclude(self, seconds: float) -> None:
        """Leave out a time in which we could not listen ourselves."""
        self._started += seconds
        self._last_message += seconds
        self._progress += seconds

    def quiet(self, now: float) -> bool:
        """Whether an engine that was ready says nothing."""
        return self._ready and now - self._last_message > self._patience.quiet_s

    def overdue(self, now: float) -> str | None:
        """Say what is overdue, or None."""
        if now - self._last_message > self._patience.silence_s:
            return f"it gave no sign of life for {self._patience.silence_s:g} s"
        if not self._ready:
            late = now - self._started > self._patience.load_s
            return f"it was not ready within {self._patience.load_s:g} s" if late else None
        if self._busy and now - self._progress > self._step_s:
            return f"it has work but finished no step within {self._step_s:g} s"
        return None
