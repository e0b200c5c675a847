"""One engine process as its parent sees it: start, messages both ways, end. Nothing of requests.

The child gets one end of a socket pair by number, and a session of its own, so that a signal to
our process group leaves it alone until we have drained. It ends when the socket does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import dreambooth
from dreambooth.limits import MIB
from dreambooth.serving.supervision.link import Link
from dreambooth.serving.supervision.messages import FromEngine, ToEngine
from dreambooth.settings.serve_options import ServeSettings

# -P: what lies in the current folder, which may be the model's, is not imported.
COMMAND: Final = (sys.executable, "-P", "-m", "dreambooth.serving.supervision.child")
# A process that has been killed is gone at once, unless a driver holds it.
_REAP_S: Final = 10.0
_POLL_S: Final = 0.01
_BUFFER_BYTES: Final = 4 * MIB

log = logging.getLogger(__name__)


class EngineProcess:
    """A running child; made by `spawn`, ended by `end`."""

    def __init__(self, process: subprocess.Popen[bytes], link: Link) -> None:
        self._process = process
        self._link = link
        self._swept = False  # what the process left behind was killed, too

    @classmethod
    async def spawn(cls, command: Sequence[str]) -> EngineProcess:
        """Start `command` with ``--fd N`` added; OSError where the system starts no process.

        It must be called in the thread of the event loop: Linux kills the child when the thread
        that started it ends.
        """
        ours, theirs = socket.socketpair()
        # A whole picture at once, where the system allows it: else both sides take turns.
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        try:
            process = subprocess.Popen(
                [*command, "--fd", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=_environment(os.environ),
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
        """The child's process id."""
        return self._process.pid

    @property
    def exited(self) -> bool:
        """Whether the process is gone, whoever may still hold its end of the socket."""
        gone = self._process.poll() is not None
        if gone and not self._swept:
            self._swept = True  # once: later the number may be another's
            self._kill_group()
        return gone

    @property
    def exit_reason(self) -> str:
        """How it ended, in words for the log."""
        code = self._process.returncode
        if code is None:
            return "it closed its connection"
        if code < 0:
            with contextlib.suppress(ValueError):
                return f"killed by {signal.Signals(-code).name}"
        return f"exit code {code}"

    async def send(self, message: ToEngine) -> None:
        """Write a message and wait while the child reads slower than we write.

        A child that is gone is no error here: `receive` tells. Raises WireError for a message
        that no frame can hold.
        """
        self._link.send(message)
        await self._link.drain()

    def send_soon(self, message: ToEngine) -> None:
        """Write a short message without waiting."""
        self._link.send(message)

    async def receive(self) -> FromEngine | None:
        """The child's next message, None when it is gone; WireError for what is no message."""
        return await self._link.receive()

    def disconnect(self) -> None:
        """Drop the connection: `receive` returns None, the child ends by itself."""
        self._link.abort()

    def kill(self) -> None:
        """Kill it and all that it started, without waiting."""
        if not self.exited:
            self._kill_group()

    async def wait(self, patience_s: float) -> bool:
        """Wait until the process is gone, at most so long; return whether it is."""
        deadline = time.monotonic() + patience_s
        while not self.exited and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_S)
        return self.exited

    async def end(self) -> None:
        """Kill what is left of it and take its exit code."""
        self.disconnect()
        self.kill()
        await self._link.wait_closed()
        if not await self.wait(_REAP_S):
            log.error("process %d of the engine does not end although it was killed", self.pid)

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)


def options(folder: Path, settings: ServeSettings) -> list[str]:
    """Return the settings that concern the engine, as `child` reads them."""
    options = [
        f"--model={folder}",
        f"--device={settings.device}",
        f"--precision={settings.precision}",
        f"--log-level={settings.log_level}",
    ]
    if settings.batch_rows is not None:
        options.append(f"--batch-rows={settings.batch_rows}")
    for option, wanted in (
        ("--no-safety-checker", not settings.safety_checker),
        ("--cuda-graphs", settings.cuda_graphs),
        ("--channels-last", settings.channels_last),
    ):
        if wanted:
            options.append(option)
    return options


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Ours, and our package in front of the import path: -P leaves the current folder out."""
    root = str(Path(dreambooth.__file__).parents[1])
    others = environ.get("PYTHONPATH", "")
    return {**environ, "PYTHONPATH": os.pathsep.join(path for path in (root, others) if path)}
