"""Run `python -m dreambooth serve` in its own process, on a free port, with a client."""

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
PATIENCE_S: Final = 300.0  # only keeps a probe from hanging; not measured
LOAD_PATIENCE_S: Final = 480.0
# SageMaker kills 30 s after SIGTERM.
STOP_S: Final = 30.0
JSON: Final = "application/json"
JSON_JPEG: Final = "application/json;jpeg"
# Gauges of work in progress: 0 when there is none.
WORK_GAUGES: Final = (
    *("requests_in_flight", "pictures_in_flight"),
    *("queued_pictures", "running_rows"),
)
_LISTENING: Final = re.compile(r"listening on http://127\.0\.0\.1:(\d+)")
_SAMPLE: Final = re.compile(r"^(?:dreambooth_)?([^\s{#]+(?:\{.*\})?) (\S+)$", re.M)


class ProbeError(DreamBoothError):
    """Raised when the server, or a package that a probe needs, is missing or unusable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A reply; ended: the monotonic moment at which all of it had arrived."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    seconds: float
    ended: float


class Server:
    """A running server process and a client for it; made by `start`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self.port = 0
        self._reading = threading.Thread(target=self._read_log, name="log")
        self._reading.start()

    @property
    def pid(self) -> int:
        """Return the id of the server's process."""
        return self.process.pid

    @property
    def log(self) -> str:
        """Return all that the server has written to stderr."""
        return "".join(tuple(self.lines))

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)

    # Requests.

    def ask(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        *,
        timeout_s: float = PATIENCE_S,
    ) -> Reply:
        """Send one request on a connection of its own. Raises OSError or HTTPException without a
        reply.
        """
        connection = http.client.HTTPConnection(HOST, self.port, timeout=timeout_s)
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
        """Send POST /invocations."""
        return self.ask(
            *("POST", "/invocations", json.dumps(asked).encode()),
            headers={"content-type": JSON, "accept": accept},
        )

    def ping(self) -> Reply:
        """Send GET /ping."""
        return self.ask("GET", "/ping")

    def metrics(self) -> dict[str, float]:
        """Return all samples of /metrics by name with labels, without the prefix `dreambooth_`."""
        page = self.ask("GET", "/metrics").body.decode()
        return {name: float(value) for name, value in _SAMPLE.findall(page)}

    def metric(self, name: str) -> float:
        """Return one sample, 0 if it is missing."""
        return self.metrics().get(name, 0.0)

    def connect(self, sent: bytes = b"") -> socket.socket:
        """Open a connection and send bytes on it; the caller closes it."""
        connection = socket.create_connection((HOST, self.port), timeout=PATIENCE_S)
        connection.sendall(sent)
        return connection

    # Waiting.

    def wait_until(
        self,
        holds: Callable[[], bool],
        what: str,
        *,
        timeout_s: float = PATIENCE_S,
        check_interval_s: float = 0.02,
    ) -> None:
        """Wait until `holds()` is true. Raises ProbeError after timeout_s, or if the server has
        ended.
        """
        end = time.monotonic() + timeout_s
        while not holds():
            if self.process.poll() is not None:
                raise ProbeError(f"The server has ended while it was waited for {what}: {self.log}")
            if time.monotonic() > end:
                raise ProbeError(f"Not within {timeout_s:g} s: {what}. Its log: {self.log[-2000:]}")
            time.sleep(check_interval_s)

    def wait_until_ready(self) -> None:
        """Wait until /ping answers 200."""
        self.wait_until(
            lambda: self.ping().status == 200,
            "/ping",
            timeout_s=LOAD_PATIENCE_S,
            check_interval_s=0.1,
        )

    def gauges_left(self, *, connections: int = 1, timeout_s: float = 10.0) -> int:
        """Return how many gauges of work are not back at 0 after at most timeout_s.

        connections: how many may be open; 1 is the one that asks.
        """
        left = -1

        def none_left() -> bool:
            nonlocal left
            now = self.metrics()
            left = sum(now.get(name, 0) != 0 for name in WORK_GAUGES)
            left += now.get("connections_open", 1) > connections
            return left == 0

        with contextlib.suppress(ProbeError):
            self.wait_until(none_left, "no work", timeout_s=timeout_s)
        return left

    def stop(self) -> None:
        """Send SIGTERM, and SIGKILL if the server has not ended STOP_S later."""
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
    model: str,
    *options: str,
    program: str = "dreambooth",
    ready: bool = True,
    open_files: int | None = None,
) -> Iterator[Server]:
    """Run `python -m PROGRAM serve` with these options; stop it at the end of the block.

    model: as `--model` takes it. ready: wait until /ping answers 200. open_files: how many files it
    may open, with None as many as we may. Raises ProbeError if it does not get ready.
    """
    command = [sys.executable, "-m", program, "serve", "--model", model]
    command += ["--port", "0", "--host", HOST, *options]
    if open_files is not None:
        command = ["bash", "-c", f'ulimit -n {open_files} && exec "$@"', "-", *command]
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
    """Return our environment with our package first on the import path, whatever the current
    folder.
    """
    root = str(Path(dreambooth.__file__).parents[1])
    others = os.environ.get("PYTHONPATH", "")
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in (root, others) if path)}
