"""The guard at the socket: connections that cost memory and bring no request are closed.

uvicorn closes neither a connection whose request head never ends nor one whose body drips in, and
takes heads of any size. `guarded` makes its protocol class keep these rules:

- the whole head within `head_s` of the connection's start or of the next request's first byte;
- the whole body within `body_s` of the head's end (bodies are small: `limits.max_body_bytes`), in
  at most `body_bytes` with the marks of its chunks; what trails the last chunk is not kept;
- the next request within `idle_s`, else the connection is closed quietly;
- an unread reply must shrink by `write_bytes` in every `write_s`;
- one request at a time: a connection that sends more (pipelining) hears `connection: close` after
  the reply to the first, as HTTP/1.1 allows;
- beyond `connections` open ones a new one is answered with 503 and closed.

After a reply that came before the whole request, input is thrown away for up to `linger_s`: closing
at once would reset the connection, and the client would lose the reply.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, ClassVar, Final

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from dreambooth.limits import KIB, LIMITS
from dreambooth.serving.contract.error_reply import ErrorReply, new_request_id
from dreambooth.serving.http.watched_transport import WatchedTransport

# Connections above the cap that may wait for their 503 to be read; the next one is just cut.
_LINGERING: Final = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardLimits:
    """What a connection may take; `idle_s` is above the 60 s that load balancers keep theirs."""

    head_s: float = 9.0  # timers may be late: all is closed within 10 s
    body_s: float = 9.0
    idle_s: int = 75
    linger_s: float = 2.0
    write_s: float = 10.0
    write_bytes: int = 64 * KIB
    head_bytes: int = 32 * KIB
    body_bytes: int = 2 * LIMITS.max_body_bytes
    headers: int = 100
    connections: int = 4_096


class _Phase(Enum):
    HEAD = auto()
    BODY = auto()
    COMPLETE = auto()  # the request is; its reply may be under way or long gone


class _Refused(Exception):
    """Raised in a callback of the parser to make it stop."""


class Guard:
    """The limits of all connections, and how often which of them was passed, by its name."""

    def __init__(self, limits: GuardLimits) -> None:
        self.limits = limits
        self.refused: Counter[str] = Counter()


def guarded(guard_of_all: Guard) -> type[GuardedProtocol]:
    """The protocol class for uvicorn's `http=`."""

    class Guarded(GuardedProtocol):
        guard = guard_of_all

    return Guarded


class GuardedProtocol(HttpToolsProtocol):
    """One connection; made by `guarded`."""

    guard: ClassVar[Guard]

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.limits = self.guard.limits
        self._phase = _Phase.HEAD
        self._head_bytes = 0
        self._body_bytes = 0
        self._deaf = False  # input is thrown away from here on
        self._timer: asyncio.TimerHandle | None = None

    # The connection begins and ends.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock, or refuse one connection too many."""
        self._watched = WatchedTransport(
            transport, self, look_s=self.limits.write_s, least_bytes=self.limits.write_bytes
        )
        super().connection_made(self._watched)  # type: ignore[arg-type]
        excess = len(self.connections) - self.limits.connections
        if excess > _LINGERING:
            transport.abort()
        elif excess > 0:
            self._refuse(503, "Too many connections are open: try again soon.", "connections")
        else:
            self._arm(self.limits.head_s, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Leave no timer behind."""
        self._arm(None)
        self._unset_keepalive_if_required()
        self._watched.forget()
        super().connection_lost(exc)

    # Bytes come in.

    def data_received(self, data: bytes) -> None:
        """Feed the parser, unless the rules above say that enough was heard."""
        if self._deaf:
            return
        self._unset_keepalive_if_required()
        if self._phase is _Phase.COMPLETE:
            if self._replying():
                self._answer_only_this_one()
                return
            self._phase, self._head_bytes = _Phase.HEAD, 0
            self._arm(self.limits.head_s, self._head_is_late)
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
            if not self._deaf:
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
            self._answer_only_this_one()
            raise _Refused
        super().on_message_begin()
        self._phase = _Phase.HEAD

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header; not what trails the last chunk, of which there may be any number."""
        if self._phase is _Phase.HEAD:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Check the head's size, hand the request on, start the body's clock."""
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self.limits.head_bytes or len(self.headers) > self.limits.headers:
            self._refuse_head()
            raise _Refused
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise _Refused
            return  # `_parse_anew` comes next
        super().on_headers_complete()
        self._phase, self._body_bytes = _Phase.BODY, 0
        self._arm(self.limits.body_s, self._body_is_late)

    def on_message_complete(self) -> None:
        """The whole request is here: whatever now lasts is our own work."""
        if self.parser.should_upgrade():
            return
        self._phase = _Phase.COMPLETE
        self._arm(None)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Send the reply before anything else is done for the connection."""
        self._watched.flush()
        super().on_response_complete()

    def _parse_anew(self, rest: bytes) -> None:
        """Ignore a wish for another protocol, as HTTP allows: the parser would skip the body."""
        head = self.parser.get_method() + b" " + self.url + b" HTTP/1.1\r\n"
        for name, value in self.headers:
            if name not in (b"upgrade", b"connection"):
                head += name + b": " + value + b"\r\n"
        self.parser = httptools.HttpRequestParser(self)
        self.parser.feed_data(head + b"\r\n" + rest)

    # Ends that the rules bring about.

    def closes_gently(self) -> bool:
        """Whether a reply that closes the connection comes before the whole request was read."""
        return self._phase is _Phase.BODY

    def linger(self) -> None:
        """Throw input away for a while, until the client has had time to read the reply."""
        self._deaf = True
        self._unset_keepalive_if_required()
        self.flow.resume_reading()
        self._arm(self.limits.linger_s, self._hang_up)

    def reader_stalls(self) -> None:
        """The client does not read its reply."""
        self.guard.refused["slow reader"] += 1
        self.transport.abort()

    def _replying(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _answer_only_this_one(self) -> None:
        self._deaf = True
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

    def _refuse_head(self) -> None:
        message = (
            f"The head of a request may have {self.limits.head_bytes} bytes and "
            f"{self.limits.headers} headers."
        )
        self._refuse(431, message, "large head")

    def _refuse(self, status: int, message: str, reason: str, *, late: bool = False) -> None:
        """Answer for a request that no route will hear of, and close; `late`: without lingering."""
        self.guard.refused[reason] += 1
        begun = self._replying() and self.cycle.response_started
        if self._replying():  # whoever waits for the body learns that nobody listens any more
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
        self._deaf = True
        self.transport.close()

    def _hang_up(self) -> None:
        self._phase = _Phase.COMPLETE
        self.transport.close()

    def _arm(self, seconds: float | None, then: Callable[[], None] | None = None) -> None:
        """One timer at a time: the next one takes the place of the last."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = (
            None if seconds is None or then is None else self.loop.call_later(seconds, then)
        )
