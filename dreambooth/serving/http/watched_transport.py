"""Wrap the transport of a connection, to watch whether the client reads and to close it gently."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol


class TransportOwner(Protocol):
    """The part of the connection's protocol that its transport calls."""

    def closes_gently(self) -> bool:
        """Return whether the client may still be sending when its reply is complete."""

    def linger(self) -> None:
        """Discard further input, since our side is closed, and hang up after a while."""

    def client_stopped_reading(self) -> None:
        """Handle a client that does not read its reply."""


class WatchedTransport:
    """Wraps a transport that must send `least_bytes` of its data every `check_interval_s`."""

    def __init__(
        self,
        inner: asyncio.Transport,
        owner: TransportOwner,
        *,
        check_interval_s: float,
        least_bytes: int,
    ) -> None:
        self._inner = inner
        self._owner = owner
        self._look_s = check_interval_s
        self._least_bytes = least_bytes
        self._lingers = False
        self._written = 0
        self._held: list[bytes] = []
        self._watch: asyncio.TimerHandle | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def write(self, data: bytes) -> None:
        """Hold the data until `flush`, in the event loop's next iteration at the latest.

        So the head and the body of a reply are sent in one call, and wake the client only once.
        """
        if not self._held:
            asyncio.get_running_loop().call_soon(self.flush)
        self._held.append(data)

    def get_write_buffer_size(self) -> int:
        """Return the number of unsent bytes."""
        return sum(map(len, self._held)) + self._inner.get_write_buffer_size()

    def write_eof(self) -> None:
        """Close our side once all data is written."""
        self.flush()
        self._inner.write_eof()

    def is_closing(self) -> bool:
        """Return True from the first `close` on, even while input is still being discarded."""
        return self._lingers or self._inner.is_closing()

    def close(self) -> None:
        """Close once all data is written; if the client may still be sending, linger first."""
        self.flush()
        if self._owner.closes_gently() and not self.is_closing():
            try:
                self._inner.write_eof()
            except OSError:  # the client has left, as the flush has just found out
                self._inner.abort()
                return
            self._lingers = True
            self._owner.linger()
        else:
            self._inner.close()

    def forget(self) -> None:
        """Stop watching and drop the held data, since the connection is lost."""
        self._held.clear()
        if self._watch is not None:
            self._watch.cancel()

    def flush(self) -> None:
        """Write the held data; begin to watch if not all of it is sent at once."""
        held, self._held = self._held, []
        if not held:
            return
        self._written += sum(map(len, held))
        self._inner.write(held[0] if len(held) == 1 else b"".join(held))
        if self._watch is None and self._inner.get_write_buffer_size():
            self._look_again()

    def _sent_bytes(self) -> int:
        return self._written - self._inner.get_write_buffer_size()

    def _look_again(self) -> None:
        loop = asyncio.get_running_loop()
        self._watch = loop.call_later(self._look_s, self._check_progress, self._sent_bytes())

    def _check_progress(self, gone_before: int) -> None:
        self._watch = None
        if not self._inner.get_write_buffer_size():
            return
        if self._sent_bytes() - gone_before < self._least_bytes:
            self._owner.client_stopped_reading()
        else:
            self._look_again()
