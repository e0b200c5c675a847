"""Hold more connections than the server may open files, while pings and pictures are asked for."""

from __future__ import annotations

import contextlib
import signal
from typing import Final

from benchmarks.server_probes import processes
from benchmarks.server_probes.outcome import Figure, ProbeOutcome
from benchmarks.server_probes.server import STOP_S, start

OPEN_FILES: tuple[int, ...] = (64, 128, 256, 1_024)
_PIECES: Final = (
    b"",
    b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /pi",
    b"HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\nGET /",
)
_ASKED: Final = {"prompt": "a cat", "num_inference_steps": 1}
_LOG_LINES: Final = 20
"""Besides one line for each request that was answered on a held connection."""


def run(model: str, *, connections: int = 2_000, times: int = 5) -> ProbeOutcome:
    """Try every number of open files with a server of its own.

    connections: how many are held. times: how often /ping and a picture are asked for.
    """
    processes.allow_files(connections + 256)
    figures = [Figure(name="connections", value=connections)]
    for files in OPEN_FILES:
        figures += _one(model, files, connections, times)
    return ProbeOutcome(probe="few_files", figures=tuple(figures))


def _one(model: str, files: int, connections: int, times: int) -> list[Figure]:
    pings = pictures = 0
    slowest_s = 0.0
    with start(model, open_files=files) as server, contextlib.ExitStack() as held:
        for number in range(connections):
            connection = held.enter_context(server.connect())
            with contextlib.suppress(ConnectionError):  # it had to give way
                connection.sendall(_PIECES[number % len(_PIECES)])
        for _ in range(times):
            ping, picture = server.ping(), server.draw(_ASKED)
            pings += ping.status == 200
            pictures += picture.status == 200
            slowest_s = max(slowest_s, ping.seconds)
        server.process.send_signal(signal.SIGTERM)
        code = server.process.wait(STOP_S)
        log = server.log
    lines = [line for line in log.splitlines() if " /metrics 200 " not in line]
    name = f"files_{files}"
    return [
        Figure(name=f"{name}_pings", value=pings, at_least=times),
        Figure(name=f"{name}_pictures", value=pictures, at_least=times),
        Figure(name=f"{name}_slowest_ping_s", value=slowest_s),
        Figure(name=f"{name}_log_lines", value=len(lines), at_most=_LOG_LINES),
        Figure(name=f"{name}_tracebacks", value=log.count("Traceback"), at_most=0),
        Figure(name=f"{name}_exit_code", value=code, at_most=0),
    ]
