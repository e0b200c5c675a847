"""Let the hosts of a job find each other before it begins, and end together.

The process that the platform starts on the first host listens on a port; those of the further hosts
connect to it, say which host they are, and learn when to start the processes that train. The
connections stay open: each host tells the others how it ended, and a connection that is lost ends
the job. Messages are JSON objects, one a line. As torch's own store, this trusts the network that
the platform makes for the hosts. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final

from dreambooth.errors import DreamBoothError, UserError, in_one_line, one_line
from dreambooth.process.stop import Stopped, signal_of
from dreambooth.settings.container import Hosts

PORT: Final = 29_500
"""The port of the first host where the others report."""

NOTE_S = 60.0
"""Hosts that cannot be reached are named this often."""

LONGEST_S = 600.0
"""After this time without one of its hosts a job ends."""

_LAST_S = 60.0  # what hosts wait for each other at the end
_TELL_S = 5.0
_RETRY_S = 1.0
_POLL_S = 0.1
_LONGEST_LINE = 16_384
_MOST_STRANGERS = 64
_TELL_FIRST_S = 30.0
_PORTS = "all hosts must reach each other's ports, beginning with {port} of the first one"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostEnd:
    """How another host ended. sentence: what it was ended by, empty where it did not say it."""

    code: int
    sentence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What all hosts start with. port: of the first host, for the processes that train."""

    port: int
    on_each_host: int


class Meeting:
    """The hosts of a job, seen from this one. A context manager around all that the host does.

    The first host's results are whole when it leaves the block, and the others leave after it.
    """

    def __init__(self, hosts: Hosts) -> None:
        self._hosts = hosts
        self._listener: socket.socket | None = None
        self._connections: dict[str, _Connection] = {}
        self.ends: dict[str, HostEnd] = {}

    @property
    def others(self) -> tuple[str, ...]:
        """Return the names of all hosts but this one."""
        current = self._hosts.current
        return self._hosts.names[:current] + self._hosts.names[current + 1 :]

    def __enter__(self) -> Meeting:
        if self._hosts.count > 1 and self._hosts.is_first:
            try:
                self._listener = socket.create_server(("", PORT), backlog=self._hosts.count + 8)
            except OSError as error:
                raise UserError(
                    f"The other hosts of this job report at port {PORT} of this one, which cannot "
                    f"be used ({error.strerror}): end what listens there."
                ) from error
            self._listener.setblocking(False)
        elif self._hosts.count > 1:
            self._connections[self._hosts.names[0]] = self._connect()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        code = 0 if error is None else error.exit_code if isinstance(error, Stopped) else 1
        began = time.monotonic()
        until = began + _LAST_S
        told = [*self._connections.values(), *self._accepted()]
        # Where the first host has trained alone or failed early, others may be on their way to it.
        late = until if error is None else began + _TELL_S * isinstance(error, Exception)
        while self._listener and len(told) < len(self.others) and time.monotonic() < late:
            time.sleep(_POLL_S)
            told += self._accepted()
        for connection in told:
            connection.send({"code": code, "sentence": _sentence(error)})
        for connection in told:
            # Docker Compose ends all containers when one ends, so that the first one has to be it.
            while not (self._hosts.is_first or connection.is_closed or time.monotonic() > until):
                connection.message()
                time.sleep(_POLL_S)
            connection.close()
        if self._listener is not None:
            self._listener.close()

    def begin(self, on_each_host: int) -> Start:
        """Wait until all hosts are there, and tell them to start. Raises UserError without one.

        Raises Stopped where one of them was stopped.
        """
        waiting = Waiting(_PORTS)
        strangers: list[_Connection] = []
        while missing := [name for name in self._hosts.names[1:] if name not in self._connections]:
            strangers = [one for one in strangers if not one.is_closed] + self._accepted()
            for stranger in strangers[:-_MOST_STRANGERS]:
                stranger.close()
            for stranger in strangers[:]:
                name = (stranger.message() or {}).get("host")
                if name in missing and name not in self._connections:
                    self._connections[name] = stranger
                    strangers.remove(stranger)
            self.poll()
            self.refuse_ended_hosts()
            waiting.note("", missing)
            time.sleep(_POLL_S)
        for stranger in strangers:
            stranger.close()
        start = Start(port=_free_port(), on_each_host=on_each_host)
        for connection in self._connections.values():
            connection.send({"port": start.port, "on_each_host": on_each_host})
        return start

    def wait_for_the_first(self) -> Start | None:
        """Return what the first host says to start; None where it has trained alone, and ended.

        Raises UserError where it has failed before the start, and Stopped where it was stopped.
        """
        (connection,) = self._connections.values()
        while True:
            message = connection.message() or {}
            port, on_each_host = message.get("port"), message.get("on_each_host")
            if isinstance(port, int) and isinstance(on_each_host, int):
                return Start(port=port, on_each_host=on_each_host)
            code = message.get("code")
            if code == 0:
                return None
            if isinstance(code, int) and (stopped := signal_of(code)) is not None:
                raise Stopped(stopped)
            if code or connection.is_closed:
                raise UserError(_ended(self._hosts.names[0]))
            time.sleep(_POLL_S)

    def poll(self) -> None:
        """Read into `ends` how other hosts have ended."""
        for name, connection in self._connections.items():
            while (message := connection.message()) is not None:
                code, sentence = message.get("code"), message.get("sentence")
                if isinstance(code, int) and isinstance(sentence, str):
                    self.ends[name] = HostEnd(code=code, sentence=one_line(sentence, 1000))
            if connection.is_closed:
                self.ends.setdefault(name, HostEnd(code=1, sentence=""))

    def wait_for_an_end(self, seconds: float) -> None:
        """Wait until another host has ended, if there is one, at most for some seconds."""
        until = time.monotonic() + seconds
        while self._connections and not self.ends and time.monotonic() < until:
            self.poll()
            time.sleep(_POLL_S)

    def refuse_failed_hosts(self) -> None:
        """Raise UserError with what another host failed of, Stopped where one was stopped."""
        for name, end in self.ends.items():
            if end.code == 1 and end.sentence:
                raise UserError(f"On host {name}: {end.sentence}")
        for end in self.ends.values():
            if (stopped := signal_of(end.code)) is not None:
                raise Stopped(stopped)

    def refuse_ended_hosts(self) -> None:
        """Raise as `refuse_failed_hosts`, and UserError for a host that ended without a word."""
        self.refuse_failed_hosts()
        for name, end in self.ends.items():
            if end.code != 0:
                raise UserError(_ended(name))

    def _accepted(self) -> list[_Connection]:
        found = []
        with contextlib.suppress(OSError):  # nobody else is there
            while self._listener is not None:
                found.append(_Connection(self._listener.accept()[0]))
        return found

    def _connect(self) -> _Connection:
        first = self._hosts.names[0]
        waiting = Waiting(_PORTS)
        while (connection := _reached(self._hosts)) is None:
            waiting.note("", [first])
            time.sleep(_RETRY_S)
        return connection


def tell_the_first(hosts: Hosts, error: Exception) -> None:
    """Tell the first host, which waits for this one, what this one failed of before they met."""
    until = time.monotonic() + _TELL_FIRST_S
    while not hosts.is_first and time.monotonic() < until:
        if (connection := _reached(hosts)) is not None:
            connection.send({"code": 1, "sentence": _sentence(error)})
            return connection.close()
        time.sleep(_RETRY_S)  # it may have failed of the same


def _reached(hosts: Hosts) -> _Connection | None:
    """Return a connection to the first host, which knows this one by it; None without one yet."""
    try:
        connected = socket.create_connection((hosts.names[0], PORT), timeout=_TELL_S)
    except OSError:  # the first host has no name or address yet, or does not listen
        return None
    connection = _Connection(connected)
    connection.send({"host": hosts.names[hosts.current]})
    return connection


def _sentence(error: BaseException | None) -> str:
    """Return what a host failed of, short enough for a message."""
    if error is None:
        return ""
    return ((str(error) if isinstance(error, DreamBoothError) else "") or in_one_line(error))[:1000]


def _ended(host: str) -> str:
    return f"The host {host} of this job has ended: its log says why."


class Waiting:
    """Names what cannot be reached, each minute, and gives up after ten.

    reason: what must be so, with {port} for the port where hosts report.
    """

    def __init__(self, reason: str) -> None:
        self._reason = reason
        self._began = time.monotonic()
        self._notes = 0

    def note(self, subject: str, hosts: Sequence[str]) -> None:
        """Log or raise UserError, when it is time, that these hosts cannot be reached.

        subject: what cannot be reached of them, nothing where it is they themselves.
        """
        waited = time.monotonic() - self._began
        if hosts:
            named = ("host " if len(hosts) == 1 else "hosts ") + ", ".join(hosts)
            subject = f"{subject} of {named}" if subject else named
        if waited >= LONGEST_S:
            raise UserError(
                f"The {subject} of this job could not be reached for {LONGEST_S / 60:g} minutes: "
                f"{self._reason.format(port=PORT)}."
            )
        if waited >= (self._notes + 1) * NOTE_S:
            self._notes += 1
            log.warning("the %s of this job cannot be reached yet", subject)


class _Connection:
    """Sends and receives messages without waiting for any."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._received = b""
        self.is_closed = False
        # A host that vanishes closes nothing: two minutes without an answer count as lost.
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 20), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, option):
                connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def send(self, message: Mapping[str, object]) -> None:
        """Send a message; one that cannot be sent shows in the closed connection."""
        self._socket.settimeout(_TELL_S)
        with contextlib.suppress(OSError):
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def message(self) -> dict[str, Any] | None:
        """Return the next whole message that has come, None if there is none.

        A line that is no message closes the connection.
        """
        while True:
            line, is_whole, rest = self._received.partition(b"\n")
            if is_whole:
                self._received = rest
                with contextlib.suppress(ValueError, RecursionError):
                    message = json.loads(line)
                    if isinstance(message, dict):
                        return message
                self._received = b""
                self.close()
            elif not self._receive():
                return None

    def _receive(self) -> bool:
        """Return whether more bytes have come."""
        if self.is_closed:
            return False
        self._socket.setblocking(False)
        try:
            data = self._socket.recv(_LONGEST_LINE)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        self._received += data
        self.is_closed = not data or len(self._received) > _LONGEST_LINE
        return not self.is_closed

    def close(self) -> None:
        self._socket.close()
        self.is_closed = True


def _free_port() -> int:
    """Return a port that nothing uses now."""
    with socket.create_server(("", 0)) as unused:
        port: int = unused.getsockname()[1]
        return port
