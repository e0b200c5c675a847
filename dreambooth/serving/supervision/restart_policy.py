"""Keeps an engine process running: starts it, listens, kills one that hangs, starts the next."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Final, Protocol

from dreambooth.serving.supervision.engine_process import EngineProcess
from dreambooth.serving.supervision.messages import FromEngine, LoadFailed, Ready
from dreambooth.serving.supervision.pending_requests import ProtocolError
from dreambooth.serving.supervision.watchdog import Patience, Watchdog
from dreambooth.serving.supervision.wire import WireError

_FIRST_BACKOFF_S: Final = 0.25
_LONGEST_BACKOFF_S: Final = 8.0
_WATCH_S: Final = 0.2
# For a process whose socket is closed to be gone as well, so that its exit code is its own.
_EXIT_S: Final = 1.0

log = logging.getLogger(__name__)


class Listener(Protocol):
    """Who is told what happens to the engine."""

    @property
    def finished(self) -> bool:
        """Whether no other process is to be started."""

    def starting(self) -> None:
        """A process is about to be started."""

    def received(self, message: FromEngine) -> None:
        """It said something; a ProtocolError from here kills it."""

    def lost(self) -> None:
        """It is gone, or is about to be killed; nothing has been waited for yet."""


def backoff_s(barren: int) -> float:
    """Seconds before the next start, after so many processes in a row that never were ready.

    One that was has drawn its test picture: its next start costs a load, and nothing is asked of it
    twice.
    """
    if barren <= 1:
        return 0.0
    return float(min(_LONGEST_BACKOFF_S, _FIRST_BACKOFF_S * 2.0 ** min(barren - 2, 16)))


class RestartPolicy:
    """One engine process at a time; `process` is None between two of them."""

    def __init__(self, command: Sequence[str], patience: Patience, listener: Listener) -> None:
        self.process: EngineProcess | None = None
        self.started = time.monotonic()  # this process
        self.restarts = 0
        self._command = command
        self._patience = patience
        self._listener = listener
        self._watchdog = Watchdog(patience, self.started)
        self._was_ready = False  # this process
        self._fault = ""  # how this process ended, as far as it is known

    @property
    def quiet(self) -> bool:
        """Whether the process has said nothing for a while; it is killed only much later."""
        return self.process is not None and self._watchdog.quiet(time.monotonic())

    def allow(self, step_s: float) -> None:
        """Large pictures are drawn: one call may take it so long."""
        self._watchdog.allow(step_s)

    async def run(self) -> None:
        """Start processes until the listener is finished; cancelling it kills the one there is."""
        barren = 0
        while True:
            self._listener.starting()
            await self._one_process()
            if self._listener.finished:
                return
            barren = 0 if self._was_ready else barren + 1
            pause = backoff_s(barren)
            log.error("the engine has ended (%s); the next starts in %g s", self._fault, pause)
            await asyncio.sleep(pause)
            self.restarts += 1

    async def _one_process(self) -> None:
        self._was_ready, self._fault = False, ""
        self.started = time.monotonic()
        self._watchdog = Watchdog(self._patience, self.started)
        try:
            self.process = process = await EngineProcess.spawn(self._command)
        except OSError as error:
            self._fault = f"it could not be started: {error}"
            self._listener.lost()
            return
        watching = asyncio.create_task(self._watch(process))
        try:
            await self._listen(process)
        except asyncio.CancelledError:
            self._fault = "stopped"
            raise
        finally:
            self.process = None
            self._listener.lost()
            watching.cancel()
            if not self._fault and await process.wait(_EXIT_S):
                self._fault = process.exit_reason
            await process.end()
            await asyncio.gather(watching, return_exceptions=True)

    async def _listen(self, process: EngineProcess) -> None:
        try:
            while (message := await process.receive()) is not None:
                self._watchdog.received(time.monotonic(), message)
                if isinstance(message, Ready):
                    self._was_ready = True
                    self._watchdog.ready(time.monotonic())
                if isinstance(message, LoadFailed):
                    self._fault = f"it was not loaded: {message.fault.message}"
                self._listener.received(message)
        except (WireError, ProtocolError) as error:
            self._fault = f"killed for talking nonsense: {error}"

    async def _watch(self, process: EngineProcess) -> None:
        """Kill a process that hangs; see one that is gone though its socket is held open."""
        last = time.monotonic()
        while not process.exited:
            await asyncio.sleep(_WATCH_S)
            now = time.monotonic()
            self._watchdog.exclude(max(0.0, now - last - 2 * _WATCH_S))  # we were held up ourselves
            last = now
            if overdue := self._watchdog.overdue(now):
                self._fault = f"killed: {overdue}"
                process.kill()
                break
        process.disconnect()
