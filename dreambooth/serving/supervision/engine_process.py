"""Start one engine process, exchange messages with it and end it.

The child gets the number of its end of a socket pair, and a session of its own, so that a signal to
our process group does not reach it before the pending requests are finished. It ends when the
socket is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from dreambooth.limits import MIB
from dreambooth.process import child_process
from dreambooth.serving.supervision.link import Link
from dreambooth.serving.supervision.messages import FromEngine, ToEngine
from dreambooth.settings.serve_options import ServeSettings

# -P: nothing is imported from the current folder, which may be the model's.
COMMAND: Final = (sys.executable, "-P", "-m", "dreambooth.serving.supervision.child")
# A process that has been killed is gone at once, unless a driver blocks it.
_REAP_S: Final = 10.0
_POLL_S: Final = 0.01
_BUFFER_BYTES: Final = 4 * MIB

log = logging.getLogger(__name__)


class EngineProcess:
    """A running child process, created by `spawn` and ended by `end`."""

    def __init__(self, process: subprocess.Popen[bytes], link: Link) -> None:
        self._process = process
        self._link = link
        self._group_killed = False  # whether the rest of its process group was killed

    @classmethod
    async def spawn(cls, command: Sequence[str]) -> EngineProcess:
        """Start `command` with ``--fd N`` added; raise OSError if it cannot be started.

        Call it in the thread of the event loop: Linux kills the child when the thread that started
        it ends.
        """
        ours, theirs = socket.socketpair()
        # A whole picture fits, if the system allows it, so that the engine does not wait for us.
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        try:
            process = subprocess.Popen(
                [*command, "--fd", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=child_process.environment(os.environ),
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.setblocking(False)
        try:
            loop = asyncio.get_running_loop()
            _, link = await loop.create_unix_connection(Link, sock=ours)
        except BaseException:
            process.kill()
            ours.close()
            raise
        return cls(process, link)

    @property
    def pid(self) -> int:
        """Return the child's process id."""
        return self._process.pid

    @property
    def exited(self) -> bool:
        """Return whether the process is gone, even if another holds its end of the socket.

        The first time, the rest of its process group is killed.
        """
        gone = self._process.poll() is not None
        if gone and not self._group_killed:
            self._group_killed = True  # only once: later the number may belong to another process
            self._kill_group()
        return gone

    @property
    def exit_reason(self) -> str:
        """Return how the process ended, in words for the log."""
        code = self._process.returncode
        if code is None:
            return "it closed its connection"
        if code < 0:
            with contextlib.suppress(ValueError):
                return f"killed by {signal.Signals(-code).name}"
        return f"exit code {code}"

    async def send(self, message: ToEngine) -> None:
        """Write a message and wait while the child reads more slowly than we write.

        If the child is gone nothing is raised here; `receive` then returns None. Raises WireError
        for a message that is too long for a frame.
        """
        self._link.send(message)
        await self._link.drain()

    def send_soon(self, message: ToEngine) -> None:
        """Write a short message without waiting."""
        self._link.send(message)

    async def receive(self) -> FromEngine | None:
        """Return the child's next message, None once it is gone; WireError as in `Link`."""
        return await self._link.receive()

    def disconnect(self) -> None:
        """Drop the connection, so that `receive` returns None and the child ends by itself."""
        self._link.abort()

    def kill(self) -> None:
        """Kill the process and all that it started, without waiting."""
        if not self.exited:
            self._kill_group()

    async def wait(self, timeout_s: float) -> bool:
        """Wait up to `timeout_s` seconds for the process to be gone; return whether it is."""
        deadline = time.monotonic() + timeout_s
        while not self.exited and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_S)
        return self.exited

    async def end(self) -> None:
        """Disconnect, kill what is left of the process and collect its exit code."""
        self.disconnect()
        self.kill()
        await self._link.wait_closed()
        if not await self.wait(_REAP_S):
            log.error("process %d of the engine does not end although it was killed", self.pid)

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)


def arguments(folder: Path, settings: ServeSettings) -> tuple[str, ...]:
    """Return the arguments of `child`: the model's folder and all settings as one JSON."""
    return f"--model={folder}", f"--settings={json.dumps(asdict(settings))}"
