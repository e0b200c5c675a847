"""The server's end of the engine's socket: whole frames in, messages out, pictures copied once.

asyncio's streams would gather a picture of 786 kB in pieces and copy it twice more; here the kernel
writes it into the memory that its pixels stay in.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final, cast

from dreambooth.limits import KIB, MIB
from dreambooth.serving.supervision import wire
from dreambooth.serving.supervision.messages import FromEngine, ToEngine
from dreambooth.serving.supervision.wire import WireError

_HEADS: Final = 64 * KIB  # what comes beside long payloads; a frame without one takes 200 bytes
# Of frames that nobody has taken yet: beyond it the engine has to wait.
MOST_BYTES: Final = 32 * MIB


class Link(asyncio.BufferedProtocol):
    """A connection to one engine; everything runs in the event loop that made it."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._heads = bytearray(_HEADS)
        self._pending = bytearray()  # the beginning of a frame
        self._header = b""
        self._payload = bytearray()
        self._missing = 0  # bytes of the payload that is being read
        self._frames: deque[tuple[bytes, bytearray]] = deque()
        self._bytes = 0
        self._fault: WireError | None = None
        self._arrived = asyncio.Event()  # a frame, or the end
        self._writable = asyncio.Event()
        self._writable.set()
        self._lost = asyncio.Event()

    # What the owner calls.

    async def receive(self) -> FromEngine | None:
        """The next message; None where the engine is gone, even in the middle of a frame.

        Raises WireError for what is no message.
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
        """Write a message without waiting; nothing happens where the engine is gone.

        Raises WireError for a message that no frame can hold.
        """
        frame = wire.pack(message)
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(b"".join(frame))

    async def drain(self) -> None:
        """Wait while the engine reads slower than we write."""
        await self._writable.wait()

    def abort(self) -> None:
        """Drop the connection: `receive` returns None."""
        if self._transport is not None:
            self._transport.abort()

    async def wait_closed(self) -> None:
        """Wait until the connection is gone."""
        await self._lost.wait()

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Wake everyone who waits."""
        for event in (self._lost, self._arrived, self._writable):
            event.set()

    def pause_writing(self) -> None:
        """The engine does not read."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """It does again."""
        self._writable.set()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go: into the payload that is under way, else to the heads."""
        if self._missing:
            return memoryview(self._payload)[-self._missing :]
        return memoryview(self._heads)

    def buffer_updated(self, nbytes: int) -> None:
        """Take what has come."""
        if self._missing:
            self._missing -= nbytes
            if not self._missing:
                self._keep()
            return
        self._pending += memoryview(self._heads)[:nbytes]
        try:
            self._cut()
        except WireError as error:
            self._fault = error
            self._arrived.set()
            self.abort()

    def _cut(self) -> None:
        """Take whole frames from what is pending, or begin a payload that is not all here."""
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
                self._keep()

    def _keep(self) -> None:
        self._frames.append((self._header, self._payload))
        self._bytes += len(self._header) + len(self._payload)
        self._arrived.set()
        if self._bytes > MOST_BYTES and self._transport is not None:
            self._transport.pause_reading()
