"""Few open files under many connections, with a stand-in for the engine, which needs no torch."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import http.client
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dreambooth.errors import UserError
from dreambooth.serving.http import server
from dreambooth.serving.http.guard import GuardLimits

ROOT = Path(__file__).parents[3]
STAND_IN = ROOT / "tests" / "serving" / "supervision" / "stand_in.py"
# The real server but for its engine. A marker that is there lets the stand-in behave.
SERVE = f"""
import resource, sys
files, port = int(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
from dreambooth.serving.http import server
from dreambooth.settings.serve_options import ServeSettings
class Supervised(server.Supervisor):
    def __init__(self, folder, settings):
        command = (sys.executable, {str(STAND_IN)!r}, "wrong_size", {str(STAND_IN)!r})
        super().__init__(folder, settings, command=command)
server.Supervisor = Supervised
sys.exit(server.run(ServeSettings(model="tiny", host="127.0.0.1", port=port)))
"""
PIECES = (
    b"",
    b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /pi",
    b"HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\nGET /",
)
DRAW = b'{"prompt": "a cat"}'
PATIENCE_S = 60


@pytest.fixture
def connections() -> Iterator[int]:
    """Yield how many connections this process may hold."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2_500 if hard == resource.RLIM_INFINITY else min(hard, 2_500)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield min(2_000, max(soft, wanted) - 300)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def ask(port: int, method: str, path: str, body: bytes | None = None) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    with contextlib.closing(connection):
        headers = {"Content-Type": "application/json", "Accept": "image/png"}
        connection.request(method, path, body, headers if body else {})
        return connection.getresponse().status


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def wait_until_ready(process: subprocess.Popen[str], port: int) -> None:
    end = time.monotonic() + PATIENCE_S
    while True:
        with contextlib.suppress(OSError):
            if ask(port, "GET", "/ping") == 200:
                return
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("files", [48, 64, 1_024])
def test_2000_held_connections_hinder_no_request(files: int, connections: int) -> None:
    port = free_port()
    command = [sys.executable, "-c", SERVE, str(files), str(port)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    with contextlib.ExitStack() as held, process:
        try:
            wait_until_ready(process, port)
            for i in range(connections):
                connection = held.enter_context(socket.create_connection(("127.0.0.1", port)))
                with contextlib.suppress(ConnectionError):  # it had to give way
                    connection.sendall(PIECES[i % len(PIECES)])
            for _ in range(3):
                assert ask(port, "GET", "/ping") == 200
                assert ask(port, "POST", "/invocations", DRAW) == 200
            process.send_signal(signal.SIGTERM)
            _, log = process.communicate(timeout=PATIENCE_S)
        finally:
            process.kill()
    assert process.returncode == 0, log
    assert "Traceback" not in log
    others = [line for line in log.splitlines() if " /metrics 200 " not in line]
    assert len(others) < 12, log[-2_000:]


@pytest.mark.parametrize("closed", [(0, 1, 2), (2,), (0, 2)])
def test_with_closed_standard_streams_it_serves(closed: tuple[int, ...]) -> None:
    port = free_port()
    command = [sys.executable, "-c", SERVE, "256", str(port)]
    process = subprocess.Popen(
        ["bash", "-c", 'exec "$@" ' + " ".join(f"{n}>&-" for n in closed), "-", *command],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:
        try:
            wait_until_ready(process, port)
            for number in closed:
                assert os.readlink(f"/proc/{process.pid}/fd/{number}") == os.devnull
            assert ask(port, "POST", "/invocations", DRAW) == 200
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_S) == 0
        finally:
            process.kill()


def test_all_connections_together_fit_into_the_open_files() -> None:
    for files in (*range(48, 300), 512, 1_024, 4_096, 8_192, 65_536):
        limits, at_once = server.guard_limits(4_096, files), server.accepted_at_once(files)
        assert limits.connections >= 1
        assert limits.lingering >= 1
        assert at_once >= 1
        # Sockets that are accepted, those that are told, those being closed, and all other files.
        assert limits.connections + limits.lingering + 4 * at_once + 40 <= files
        assert limits.connections <= 4_096
        assert server.guard_limits(1, files).connections == 1
        if files >= 8_192:
            assert limits.connections == GuardLimits().connections


def test_too_few_files_are_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for hard in (0, 20, 47):
        monkeypatch.setattr(resource, "getrlimit", lambda _, hard=hard: (hard, hard))
        with pytest.raises(UserError, match=f"open {hard} files, and the server needs 48"):
            server._raise_file_limit()


def test_what_repeats_is_one_line_a_second(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    now = 0.0
    handler = server.LoopErrors(lambda: now)
    loop = asyncio.new_event_loop()
    numbers = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
    for second in range(3):
        for i in range(2_048):
            now = second + i / 2_048
            error = OSError(numbers[i % 4], os.strerror(numbers[i % 4]))
            handler(loop, {"message": "socket.accept() out of system resource", "exception": error})
    assert len(caplog.records) == 3
    assert all(record.exc_info is None for record in caplog.records)
    caplog.clear()
    handler(loop, {"message": "Task exception was never retrieved", "exception": KeyError("x")})
    (record,) = caplog.records
    assert record.exc_info, "a fault of ours keeps its trace"
    loop.close()
