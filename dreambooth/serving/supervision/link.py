"""Connect the server's process and the engine's: `Link` is the server's end of the socket.

asyncio's streams would gather a picture of 786 kB in pieces and copy it twice more. Here the kernel
writes it into the memory in which its pixels stay. At the engine's end a thread reads by
`read_blocking`, and a `SendQueue` writes from another, so that drawing waits for neither.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections import deque
from itertools import islice
from typing import Final, cast

from dreambooth.limits import KIB, MIB
from dreambooth.serving.supervision import messages
from dreambooth.serving.supervision.messages import FromEngine, ToEngine, WireError

_HEADS: Final = 64 * KIB  # buffer for all but long payloads; a frame without one takes 200 bytes
# The most bytes of received frames that nobody has taken yet; beyond them the engine must wait.
MOST_BYTES: Final = 32 * MIB
# The most bytes of messages that the engine has not sent yet: some twenty pictures of the largest
# size. The server reads all the time; the queue fills only if the server is blocked for long, and
# then the engine has to wait for it.
MOST_UNSENT_BYTES: Final = 256 * MIB
_MOST_AT_ONCE: Final = 64  # frames; IOV_MAX allows 1,024 pieces


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
        return cast(FromEngine, messages.unpack(header, payload, FromEngine))

    def send(self, message: ToEngine) -> None:
        """Write a message without waiting; do nothing if the engine is gone.

        Raises WireError for a message that is too long for a frame.
        """
        frame = messages.pack(message)
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
        while len(self._pending) >= messages.PREFIX_BYTES:
            header, payload = messages.lengths(self._pending[: messages.PREFIX_BYTES])
            begin, end = messages.PREFIX_BYTES + header, messages.PREFIX_BYTES + header + payload
            if len(self._pending) < begin:
                return
            self._header = bytes(self._pending[messages.PREFIX_BYTES : begin])
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


class SendQueue:
    """The messages that the engine sends, in order; every method may be called from any thread."""

    def __init__(self, connection: socket.socket, *, most_bytes: int = MOST_UNSENT_BYTES) -> None:
        """Start the thread that writes to `connection`, a blocking socket."""
        self._connection = connection
        self._most_bytes = most_bytes
        self._frames: deque[tuple[bytes, bytes | memoryview]] = deque()
        self._bytes = 0  # of the frames that are queued or being written
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._write, name="send_queue", daemon=True)
        self._thread.start()

    def put(self, message: FromEngine) -> None:
        """Queue a message, waiting while there are `most_bytes` unsent; drop it if closed."""
        frame = messages.pack(message)
        size = len(frame[0]) + len(frame[1])
        with self._changed:
            while self._bytes and self._bytes + size > self._most_bytes and not self._closed:
                self._changed.wait()
            if not self._closed:
                self._frames.append(frame)
                self._bytes += size
                self._changed.notify_all()

    def close(self, timeout_s: float) -> None:
        """Accept no more messages, and wait up to `timeout_s` seconds until all are written."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout_s)

    def _write(self) -> None:
        while True:
            with self._changed:
                while not self._frames and not self._closed:
                    self._changed.wait()
                if not self._frames:
                    return
                parts = [part for frame in islice(self._frames, _MOST_AT_ONCE) for part in frame]
                for _ in range(len(parts) // 2):
                    self._frames.popleft()
            try:
                self._send(parts)
            except OSError:  # the server is gone; the thread that reads from it ends the process
                with self._changed:
                    self._closed = True
                    self._frames.clear()
                    self._changed.notify_all()
                return
            with self._changed:
                self._bytes -= sum(map(len, parts))
                self._changed.notify_all()

    def _send(self, parts: list[bytes | memoryview]) -> None:
        """Write all parts, in one call if the socket takes them: each call may wake the server."""
        views = [memoryview(part) for part in parts if part]
        while views:
            sent = self._connection.sendmsg(views)
            while views and sent >= len(views[0]):
                sent -= len(views.pop(0))
            if sent:
                views[0] = views[0][sent:]


def read_blocking(connection: socket.socket) -> ToEngine | None:
    """Read the server's next message from a blocking socket.

    Return None if the server is gone, even in the middle of a frame. Raises WireError for bytes
    that are no message.
    """
    prefix = _exactly(connection, messages.PREFIX_BYTES)
    if prefix is None:
        return None
    header_bytes, payload_bytes = messages.lengths(prefix)
    header = _exactly(connection, header_bytes)
    payload = _exactly(connection, payload_bytes)
    if header is None or payload is None:
        return None
    return cast(ToEngine, messages.unpack(header, payload, ToEngine))


def _exactly(connection: socket.socket, count: int) -> bytes | None:
    received = bytearray(count)
    view = memoryview(received)
    while view:
        try:
            got = connection.recv_into(view)
        except OSError:
            return None
        if not got:
            return None
        view = view[got:]
    return bytes(received)
