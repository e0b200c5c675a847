"""Keep an engine process running: start it, pass its messages on, and replace one that hangs."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Final, Protocol

from dreambooth.serving.supervision.engine_process import EngineProcess
from dreambooth.serving.supervision.messages import FromEngine, LoadFailed, Ready, WireError
from dreambooth.serving.supervision.pending_requests import ProtocolError
from dreambooth.serving.supervision.watchdog import EngineTimeouts, Watchdog

_FIRST_BACKOFF_S: Final = 0.25
_LONGEST_BACKOFF_S: Final = 8.0
_WATCH_S: Final = 0.2
# How long a process may take to exit after its socket was closed, before it is killed; its own
# exit code is worth logging.
_EXIT_S: Final = 1.0

log = logging.getLogger(__name__)


class Listener(Protocol):
    """An object that handles what happens to the engine process."""

    @property
    def finished(self) -> bool:
        """Return whether no further process should be started."""

    def starting(self) -> None:
        """Handle that a process is about to be started."""

    def received(self, message: FromEngine) -> None:
        """Handle a message; if this raises ProtocolError, the process is killed."""

    def lost(self) -> None:
        """Handle that the process is gone or will be killed; called before anything is awaited."""


def backoff_s(failed_starts: int) -> float:
    """Return the seconds to wait before the next start.

    failed_starts: how many processes in a row were never ready. After a process that was ready
    there is no wait: it had drawn its warm-up picture, so the next start costs one load, and no
    request is sent twice.
    """
    if failed_starts <= 1:
        return 0.0
    return float(min(_LONGEST_BACKOFF_S, _FIRST_BACKOFF_S * 2.0 ** min(failed_starts - 2, 16)))


class RestartPolicy:
    """Runs one engine process at a time; `process` is None between two of them."""

    def __init__(
        self, command: Sequence[str], timeouts: EngineTimeouts, listener: Listener
    ) -> None:
        self.process: EngineProcess | None = None
        self.started = time.monotonic()  # of this process
        self.restarts = 0
        self._command = command
        self._timeouts = timeouts
        self._listener = listener
        self._watchdog = Watchdog(timeouts, self.started)
        self._was_ready = False  # whether this process ever was
        self._fault = ""  # how this process ended, "" while that is unknown

    @property
    def quiet(self) -> bool:
        """Return whether the process has sent nothing for a while; it is killed only much later."""
        return self.process is not None and self._watchdog.quiet(time.monotonic())

    def allow(self, step_s: float) -> None:
        """Let one U-Net call take `step_s` seconds, since large pictures are being drawn."""
        self._watchdog.allow(step_s)

    async def run(self) -> None:
        """Start processes until the listener is finished; when cancelled, kill the running one."""
        failed_starts = 0
        while True:
            self._listener.starting()
            await self._one_process()
            if self._listener.finished:
                return
            failed_starts = 0 if self._was_ready else failed_starts + 1
            pause = backoff_s(failed_starts)
            log.error("the engine has ended (%s); the next starts in %g s", self._fault, pause)
            await asyncio.sleep(pause)
            self.restarts += 1

    async def _one_process(self) -> None:
        self._was_ready, self._fault = False, ""
        self.started = time.monotonic()
        self._watchdog = Watchdog(self._timeouts, self.started)
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
            self._fault = f"killed for a malformed message: {error}"

    async def _watch(self, process: EngineProcess) -> None:
        """Kill the process if it hangs; disconnect once it is gone, even if its socket is open."""
        last = time.monotonic()
        while not process.exited:
            await asyncio.sleep(_WATCH_S)
            now = time.monotonic()
            self._watchdog.exclude(max(0.0, now - last - 2 * _WATCH_S))  # we were blocked ourselves
            last = now
            if overdue := self._watchdog.overdue(now):
                self._fault = f"killed: {overdue}"
                process.kill()
                break
        process.disconnect()
