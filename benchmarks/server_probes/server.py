"""`python -m dreambooth serve` in a process of its own, on a free port, and a client for it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import dreambooth
from dreambooth.errors import DreamBoothError

HOST: Final = "127.0.0.1"
PATIENCE_S: Final = 300.0  # a guard against hanging, not a figure
LOAD_PATIENCE_S: Final = 480.0
# SageMaker kills 30 s after SIGTERM.
STOP_S: Final = 30.0
JSON: Final = "application/json"
JSON_JPEG: Final = "application/json;jpeg"
# Of work that is under way; without any they are 0.
WORK_GAUGES: Final = (
    *("requests_in_flight", "pictures_in_flight"),
    *("queued_pictures", "running_rows"),
)
_LISTENING: Final = re.compile(r"listening on http://127\.0\.0\.1:(\d+)")
_SAMPLE: Final = re.compile(r"^(?:dreambooth_)?([^\s{#]+(?:\{.*\})?) (\S+)$", re.M)


class ProbeError(DreamBoothError):
    """The server is not there, or not as a probe needs it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What came back; `ended` is the monotonic moment at which all of it was here."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    seconds: float
    ended: float


class Server:
    """A server that was started; made by `start`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self.port = 0
        self._reading = threading.Thread(target=self._read_log, name="log")
        self._reading.start()

    @property
    def pid(self) -> int:
        """Of the server's process."""
        return self.process.pid

    @property
    def log(self) -> str:
        """All that it has said."""
        return "".join(tuple(self.lines))

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)

    # Asking.

    def ask(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        *,
        patience_s: float = PATIENCE_S,
    ) -> Reply:
        """One request on a connection of its own; OSError or HTTPException where none answers."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=patience_s)
        begun = time.monotonic()
        with contextlib.closing(connection):
            connection.request(method, path, body, dict(headers or {}))
            reply = connection.getresponse()
            content, ended = reply.read(), time.monotonic()
        return Reply(
            status=reply.status,
            headers={name.lower(): value for name, value in reply.getheaders()},
            body=content,
            seconds=ended - begun,
            ended=ended,
        )

    def draw(self, asked: Mapping[str, object], accept: str = JSON_JPEG) -> Reply:
        """POST /invocations."""
        return self.ask(
            *("POST", "/invocations", json.dumps(asked).encode()),
            headers={"content-type": JSON, "accept": accept},
        )

    def ping(self) -> Reply:
        """GET /ping."""
        return self.ask("GET", "/ping")

    def metrics(self) -> dict[str, float]:
        """All samples, by name with labels, ours without the prefix `dreambooth_`."""
        page = self.ask("GET", "/metrics").body.decode()
        return {name: float(value) for name, value in _SAMPLE.findall(page)}

    def metric(self, name: str) -> float:
        """One sample, 0 where it is not there."""
        return self.metrics().get(name, 0.0)

    def connect(self, sent: bytes = b"") -> socket.socket:
        """A connection of which the caller takes care."""
        connection = socket.create_connection((HOST, self.port), timeout=PATIENCE_S)
        connection.sendall(sent)
        return connection

    # Waiting.

    def wait_until(
        self,
        holds: Callable[[], bool],
        what: str,
        *,
        patience_s: float = PATIENCE_S,
        look_s: float = 0.02,
    ) -> None:
        """Return when it holds; ProbeError where it does not in time, or the server has ended."""
        end = time.monotonic() + patience_s
        while not holds():
            if self.process.poll() is not None:
                raise ProbeError(f"The server has ended while it was waited for {what}: {self.log}")
            if time.monotonic() > end:
                raise ProbeError(
                    f"Not within {patience_s:g} s: {what}. Its log: {self.log[-2000:]}"
                )
            time.sleep(look_s)

    def wait_until_ready(self) -> None:
        """Until /ping says 200."""
        self.wait_until(
            lambda: self.ping().status == 200, "/ping", patience_s=LOAD_PATIENCE_S, look_s=0.1
        )

    def gauges_left(self, *, connections: int = 1, patience_s: float = 10.0) -> int:
        """How many gauges of work are not back at 0, after so long at most.

        connections: so many may be open besides; 1 is the one that asks.
        """
        left = -1

        def none_left() -> bool:
            nonlocal left
            now = self.metrics()
            left = sum(now.get(name, 0) != 0 for name in WORK_GAUGES)
            left += now.get("connections_open", 1) > connections
            return left == 0

        with contextlib.suppress(ProbeError):
            self.wait_until(none_left, "no work", patience_s=patience_s)
        return left

    def stop(self) -> None:
        """SIGTERM, and SIGKILL where that does not end it."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()
        self._reading.join()
        assert self.process.stderr is not None
        self.process.stderr.close()


@contextlib.contextmanager
def start(
    model: str, *options: str, program: str = "dreambooth", ready: bool = True
) -> Iterator[Server]:
    """Run `python -m PROGRAM serve` with these options; stop it at the end.

    model: as `--model` takes it. ready: wait until /ping says so. ProbeError where it does not.
    """
    command = [sys.executable, "-m", program, "serve", "--model", model]
    command += ["--port", "0", "--host", HOST, *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=_environment())
    server = Server(process)
    try:
        server.wait_until(lambda: bool(_LISTENING.search(server.log)), "a port")
        server.port = int(_LISTENING.findall(server.log)[0])
        if ready:
            server.wait_until_ready()
        yield server
    finally:
        server.stop()


def _environment() -> dict[str, str]:
    """Ours, and our package in front of the import path, whatever folder we are called in."""
    root = str(Path(dreambooth.__file__).parents[1])
    others = os.environ.get("PYTHONPATH", "")
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in (root, others) if path)}
