"""Send bytes to the server and read its first reply, whatever the bytes are."""

from __future__ import annotations

import contextlib
import http.client
import socket
import time
from dataclasses import dataclass

from benchmarks.server_probes.mutations import Case
from benchmarks.server_probes.server import Server


@dataclass(frozen=True, slots=True, kw_only=True)
class RawReply:
    """A reply; status: None if the connection was closed, or nothing came for too long."""

    status: int | None
    body: bytes
    seconds: float


class RawClient:
    """A client that keeps its connection as long as the server does."""

    def __init__(self, server: Server, *, timeout_s: float) -> None:
        self._server = server
        self._timeout_s = timeout_s
        self._connection: socket.socket | None = None

    def ask(self, case: Case, *, again: bool = True) -> RawReply:
        """Send a case and read the first reply.

        again: send once more on a new connection if the one that was kept turns out to be closed.
        """
        kept = self._connection is not None
        connection = self._connection or self._server.connect()
        connection.settimeout(self._timeout_s)
        begun = time.monotonic()
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(case.sent)  # a refusal may come before all is sent
            reply = http.client.HTTPResponse(connection, method=case.method)
            with contextlib.closing(reply):
                reply.begin()
                status, body = reply.status, reply.read()
                closed = reply.will_close or reply.version == 10
        except (OSError, http.client.HTTPException):
            self._leave(connection)
            if kept and again:
                return self.ask(case, again=False)
            return RawReply(status=None, body=b"", seconds=time.monotonic() - begun)
        seconds = time.monotonic() - begun
        if closed:
            self._leave(connection)
        else:
            self._connection = connection
        return RawReply(status=status, body=body, seconds=seconds)

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._connection is not None:
            self._leave(self._connection)

    def _leave(self, connection: socket.socket) -> None:
        connection.close()
        self._connection = None
