"""A connection's transport that watches whether the client reads, and need not close at once."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol


class Owner(Protocol):
    """The protocol of the connection, as far as its transport asks it."""

    def closes_gently(self) -> bool:
        """Whether the client may still be sending when its reply is complete."""

    def linger(self) -> None:
        """Our side is closed: throw away what still comes, and hang up after a while."""

    def reader_stalls(self) -> None:
        """The client does not read its reply."""


class WatchedTransport:
    """Wraps a transport: every `look_s` seconds `least_bytes` of what is unsent must have gone."""

    def __init__(
        self, inner: asyncio.Transport, owner: Owner, *, look_s: float, least_bytes: int
    ) -> None:
        self._inner = inner
        self._owner = owner
        self._look_s = look_s
        self._least_bytes = least_bytes
        self._lingers = False
        self._written = 0
        self._held: list[bytes] = []
        self._watch: asyncio.TimerHandle | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def write(self, data: bytes) -> None:
        """Hold it until `flush`, which comes in the event loop's next iteration if nobody calls it.

        So the head and the body of a reply go out in one call, and wake the client once.
        """
        if not self._held:
            asyncio.get_running_loop().call_soon(self.flush)
        self._held.append(data)

    def get_write_buffer_size(self) -> int:
        """Bytes that are not sent."""
        return sum(map(len, self._held)) + self._inner.get_write_buffer_size()

    def write_eof(self) -> None:
        """Close our side once all is written."""
        self.flush()
        self._inner.write_eof()

    def is_closing(self) -> bool:
        """True from the first `close` on, though input may still be thrown away."""
        return self._lingers or self._inner.is_closing()

    def close(self) -> None:
        """Close when all is written; before that, let a client finish that still sends."""
        self.flush()
        if self._owner.closes_gently() and not self.is_closing():
            try:
                self._inner.write_eof()
            except OSError:  # the client has left, and what was just written found that out
                self._inner.abort()
                return
            self._lingers = True
            self._owner.linger()
        else:
            self._inner.close()

    def forget(self) -> None:
        """Watch and hold nothing any longer: the connection is lost."""
        self._held.clear()
        if self._watch is not None:
            self._watch.cancel()

    def flush(self) -> None:
        """Hand on what was held; where not all of it goes out at once, begin to watch."""
        held, self._held = self._held, []
        if not held:
            return
        self._written += sum(map(len, held))
        self._inner.write(held[0] if len(held) == 1 else b"".join(held))
        if self._watch is None and self._inner.get_write_buffer_size():
            self._look_again()

    def _gone(self) -> int:
        return self._written - self._inner.get_write_buffer_size()

    def _look_again(self) -> None:
        loop = asyncio.get_running_loop()
        self._watch = loop.call_later(self._look_s, self._look, self._gone())

    def _look(self, gone_before: int) -> None:
        self._watch = None
        if not self._inner.get_write_buffer_size():
            return
        if self._gone() - gone_before < self._least_bytes:
            self._owner.reader_stalls()
        else:
            self._look_again()
