"""Close connections that take up memory and bring no request.

uvicorn closes neither a connection whose request head never ends nor one whose body comes in byte
by byte, and it accepts heads of any size. `guarded` makes its protocol class keep these rules:

- The whole head must arrive within `head_s` of the connection's start or of the next request's
  first byte.
- The whole body must arrive within `body_s` of the head's end (bodies are small:
  `limits.max_body_bytes`), in at most `body_bytes`, chunk marks included. Trailers after the last
  chunk are not kept.
- The next request must begin within `idle_s`; otherwise the connection is closed without a reply.
- An unread reply must shrink by `write_bytes` in every `write_s`.
- Only one request at a time is read: if a connection sends more (pipelining), the reply to the
  first has `connection: close`, as HTTP/1.1 allows.
- If `connections` are open, a new one takes the place of the one that has owed the head of a
  request for longest; if none does, it is answered with 503 and closed.

After a reply that came before the whole request, input is discarded for up to `linger_s`: closing
at once would reset the connection, and the client would lose the reply.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, ClassVar

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from dreambooth.limits import KIB, LIMITS
from dreambooth.serving.contract.error_reply import ErrorReply, new_request_id
from dreambooth.serving.http.watched_transport import WatchedTransport


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardLimits:
    """The limits of a connection; load balancers keep an idle one for 60 s, less than `idle_s`.

    lingering: connections above `connections` that may wait until their 503 is read; any further
    one is aborted.
    """

    head_s: float = 9.0  # leaves time for late timers: all is closed within 10 s
    body_s: float = 9.0
    idle_s: int = 75
    linger_s: float = 2.0
    write_s: float = 10.0
    write_bytes: int = 64 * KIB
    head_bytes: int = 32 * KIB
    body_bytes: int = 2 * LIMITS.max_body_bytes
    headers: int = 100
    connections: int = 4_096
    lingering: int = 256


class _Phase(Enum):
    HEAD = auto()
    BODY = auto()
    COMPLETE = auto()  # the request is complete; its reply may be unsent, partly sent or sent


class _Refused(Exception):
    """Raised in a callback of the parser to stop it."""


class Guard:
    """The limits of all connections, and how many were closed for each reason.

    owing: the connections that may send the head of a request next, the longest-waiting one first.
    """

    def __init__(self, limits: GuardLimits) -> None:
        self.limits = limits
        self.refused: Counter[str] = Counter()
        self.owing: dict[GuardedProtocol, None] = {}


def guarded(shared_guard: Guard) -> type[GuardedProtocol]:
    """Return the protocol class for uvicorn's `http=`."""

    class Guarded(GuardedProtocol):
        guard = shared_guard

    return Guarded


class GuardedProtocol(HttpToolsProtocol):
    """The protocol of one connection; `guarded` returns the subclass that has a `guard`."""

    guard: ClassVar[Guard]

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.limits = self.guard.limits
        self._phase = _Phase.HEAD
        self._head_bytes = 0
        self._body_bytes = 0
        self._discard_input = False  # once True, all further input is discarded
        self._timer: asyncio.TimerHandle | None = None

    # The connection begins and ends.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timer for the head, or refuse the connection if too many are open."""
        self._watched = WatchedTransport(
            transport,
            self,
            check_interval_s=self.limits.write_s,
            least_bytes=self.limits.write_bytes,
        )
        super().connection_made(self._watched)  # type: ignore[arg-type]
        excess = len(self.connections) - self.limits.connections
        if excess > self.limits.lingering:
            transport.abort()
            return
        if excess > 0:
            oldest = next(iter(self.guard.owing), None)
            if oldest is None:
                self._refuse_connection()
                return
            oldest.give_way()
        self.guard.owing[self] = None
        self._set_timer(self.limits.head_s, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel all timers."""
        self.guard.owing.pop(self, None)
        self._set_timer(None)
        self._unset_keepalive_if_required()
        self._watched.forget()
        super().connection_lost(exc)

    # Bytes come in.

    def data_received(self, data: bytes) -> None:
        """Feed the parser, unless one of the rules above has ended the input."""
        if self._discard_input:
            return
        self._unset_keepalive_if_required()
        if self._phase is _Phase.COMPLETE:
            if self._replying():
                self._stop_pipelining()
                return
            self._phase, self._head_bytes = _Phase.HEAD, 0
            self._set_timer(self.limits.head_s, self._head_is_late)
        if self._phase is _Phase.HEAD:
            self._head_bytes += len(data)
        else:
            self._body_bytes += len(data)
        try:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                self._parse_anew(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            if not self._discard_input:
                self._refuse(400, "This is not a valid HTTP/1.1 request.", "malformed")
            return
        if self._phase is _Phase.HEAD and self._head_bytes > self.limits.head_bytes:
            self._refuse_head()
        elif self._phase is _Phase.BODY and self._body_bytes > self.limits.body_bytes:
            message = f"A body may take {self.limits.body_bytes} bytes, chunk marks included."
            self._refuse(413, message, "large body")

    def on_message_begin(self) -> None:
        """Stop at a second request in the same bytes."""
        if self._replying():
            self._stop_pipelining()
            raise _Refused
        super().on_message_begin()
        self._phase = _Phase.HEAD

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header, but no trailers after the last chunk, whose number is not limited."""
        if self._phase is _Phase.HEAD:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Check the head's size, pass the request on and start the timer for the body."""
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self.limits.head_bytes or len(self.headers) > self.limits.headers:
            self._refuse_head()
            raise _Refused
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise _Refused
            return  # `_parse_anew` comes next
        super().on_headers_complete()
        self.guard.owing.pop(self, None)
        self._phase, self._body_bytes = _Phase.BODY, 0
        self._set_timer(self.limits.body_s, self._body_is_late)

    def on_message_complete(self) -> None:
        """Stop the timer, since the whole request has arrived."""
        if self.parser.should_upgrade():
            return
        self._phase = _Phase.COMPLETE
        self._set_timer(None)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Send the reply before anything else is done for the connection."""
        self._watched.flush()
        super().on_response_complete()
        if not self.transport.is_closing():
            self.guard.owing[self] = None

    def _parse_anew(self, rest: bytes) -> None:
        """Ignore a request to upgrade the protocol, as HTTP allows, by parsing it without that.

        Otherwise the parser would skip its body.
        """
        head = self.parser.get_method() + b" " + self.url + b" HTTP/1.1\r\n"
        for name, value in self.headers:
            if name not in (b"upgrade", b"connection"):
                head += name + b": " + value + b"\r\n"
        self.parser = httptools.HttpRequestParser(self)
        self.parser.feed_data(head + b"\r\n" + rest)

    # The rules close the connection.

    def closes_gently(self) -> bool:
        """Return whether the client may still be sending when a reply closes the connection."""
        return self._phase is _Phase.BODY

    def linger(self) -> None:
        """Discard input for `linger_s` seconds, so that the client has time to read the reply."""
        self._discard_input = True
        self._unset_keepalive_if_required()
        self.flow.resume_reading()
        self._set_timer(self.limits.linger_s, self._hang_up)

    def give_way(self) -> None:
        """Close this connection, which owes the head of a request, in favour of a new one."""
        if self._phase is _Phase.HEAD and self._head_bytes:
            self._refuse_connection(late=True)
        else:
            self.guard.refused["idle"] += 1
            self._hang_up()

    def client_stopped_reading(self) -> None:
        """Abort the connection of a client that does not read its reply."""
        self.guard.refused["slow reader"] += 1
        self.transport.abort()

    def _replying(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _stop_pipelining(self) -> None:
        self._discard_input = True
        if self.cycle is not None:
            self.cycle.keep_alive = False

    def _head_is_late(self) -> None:
        if self._head_bytes:
            self._refuse(
                408, "The head of the request did not come in time.", "slow head", late=True
            )
        else:
            self.guard.refused["no request"] += 1
            self._hang_up()

    def _body_is_late(self) -> None:
        self._refuse(408, "The body of the request did not come in time.", "slow body", late=True)

    def _refuse_connection(self, *, late: bool = False) -> None:
        message = "Too many connections are open: try again soon."
        self._refuse(503, message, "connections", late=late)

    def _refuse_head(self) -> None:
        message = (
            f"The head of a request may have {self.limits.head_bytes} bytes and "
            f"{self.limits.headers} headers."
        )
        self._refuse(431, message, "large head")

    def _refuse(self, status: int, message: str, reason: str, *, late: bool = False) -> None:
        """Send an error unless a reply has begun, and close; `late`: without lingering."""
        self.guard.refused[reason] += 1
        self.guard.owing.pop(self, None)
        begun = self._replying() and self.cycle.response_started
        if self._replying():  # let the route that waits for the body see a disconnect
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        answered = self._phase is _Phase.BODY and not self._replying()
        if not (begun or answered):
            reply = ErrorReply(
                status=status,
                type="RequestError" if status < 500 else "UnavailableError",
                message=message,
                retry_after_s=1.0 if status == 503 else None,
            )
            body = reply.body(new_request_id())
            head = b"content-type: application/json\r\ncontent-length: %d\r\n" % len(body)
            self.transport.write(STATUS_LINE[status] + head + b"connection: close\r\n\r\n" + body)
        self._phase = _Phase.COMPLETE if late else _Phase.BODY
        self._discard_input = True
        self.transport.close()

    def _hang_up(self) -> None:
        self.guard.owing.pop(self, None)
        self._phase = _Phase.COMPLETE
        self.transport.close()

    def _set_timer(self, seconds: float | None, then: Callable[[], None] | None = None) -> None:
        """Replace the connection's only timer; None just cancels it."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = (
            None if seconds is None or then is None else self.loop.call_later(seconds, then)
        )
