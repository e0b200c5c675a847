"""Exchange messages with the engine at the server's end of the socket, copying pictures once.

asyncio's streams would gather a picture of 786 kB in pieces and copy it twice more. Here the kernel
writes it into the memory in which its pixels stay.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final, cast

from dreambooth.limits import KIB, MIB
from dreambooth.serving.supervision import wire
from dreambooth.serving.supervision.messages import FromEngine, ToEngine
from dreambooth.serving.supervision.wire import WireError

_HEADS: Final = 64 * KIB  # buffer for all but long payloads; a frame without one takes 200 bytes
# The most bytes of received frames that nobody has taken yet; beyond them the engine must wait.
MOST_BYTES: Final = 32 * MIB


class Link(asyncio.BufferedProtocol):
    """A connection to one engine; everything runs in the event loop that created it."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._receive_buffer = bytearray(_HEADS)
        self._pending = bytearray()  # the beginning of an incomplete frame
        self._header = b""
        self._payload = bytearray()
        self._missing = 0  # bytes of the current payload that have not arrived
        self._frames: deque[tuple[bytes, bytearray]] = deque()
        self._bytes = 0
        self._fault: WireError | None = None
        self._arrived = asyncio.Event()  # set by a frame, an error or the end
        self._writable = asyncio.Event()
        self._writable.set()
        self._lost = asyncio.Event()

    # Called by the owner.

    async def receive(self) -> FromEngine | None:
        """Return the next message; None once the engine is gone, even in the middle of a frame.

        Raises WireError for bytes that are no message.
        """
        while not self._frames:
            if self._fault is not None:
                raise self._fault
            if self._lost.is_set():
                return None
            self._arrived.clear()
            await self._arrived.wait()
        header, payload = self._frames.popleft()
        self._bytes -= len(header) + len(payload)
        if self._transport is not None and self._bytes <= MOST_BYTES:
            self._transport.resume_reading()
        return cast(FromEngine, wire.unpack(header, payload, FromEngine))

    def send(self, message: ToEngine) -> None:
        """Write a message without waiting; do nothing if the engine is gone.

        Raises WireError for a message that is too long for a frame.
        """
        frame = wire.pack(message)
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(b"".join(frame))

    async def drain(self) -> None:
        """Wait while the engine reads more slowly than we write."""
        await self._writable.wait()

    def abort(self) -> None:
        """Drop the connection, so that `receive` returns None."""
        if self._transport is not None:
            self._transport.abort()

    async def wait_closed(self) -> None:
        """Wait until the connection is gone."""
        await self._lost.wait()

    # Called by the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Wake all tasks that wait here."""
        for event in (self._lost, self._arrived, self._writable):
            event.set()

    def pause_writing(self) -> None:
        """Make `drain` wait, since the engine does not read."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """Let `drain` return, since the engine reads again."""
        self._writable.set()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return where the next bytes go: into an unfinished payload, else into the buffer."""
        if self._missing:
            return memoryview(self._payload)[-self._missing :]
        return memoryview(self._receive_buffer)

    def buffer_updated(self, nbytes: int) -> None:
        """Process the bytes that have arrived."""
        if self._missing:
            self._missing -= nbytes
            if not self._missing:
                self._store_frame()
            return
        self._pending += memoryview(self._receive_buffer)[:nbytes]
        try:
            self._split_frames()
        except WireError as error:
            self._fault = error
            self._arrived.set()
            self.abort()

    def _split_frames(self) -> None:
        """Take whole frames from the pending bytes, and begin a payload that is incomplete."""
        while len(self._pending) >= wire.PREFIX_BYTES:
            header, payload = wire.lengths(self._pending[: wire.PREFIX_BYTES])
            begin, end = wire.PREFIX_BYTES + header, wire.PREFIX_BYTES + header + payload
            if len(self._pending) < begin:
                return
            self._header = bytes(self._pending[wire.PREFIX_BYTES : begin])
            self._payload = bytearray(payload)
            here = self._pending[begin:end]
            self._payload[: len(here)] = here
            self._missing = payload - len(here)
            del self._pending[:end]
            if not self._missing:
                self._store_frame()

    def _store_frame(self) -> None:
        self._frames.append((self._header, self._payload))
        self._bytes += len(self._header) + len(self._payload)
        self._arrived.set()
        if self._bytes > MOST_BYTES and self._transport is not None:
            self._transport.pause_reading()
