"""Send the messages of the engine process in order, from a bounded queue and a separate thread."""

from __future__ import annotations

import socket
import threading
from collections import deque
from itertools import islice
from typing import Final

from dreambooth.limits import MIB
from dreambooth.serving.supervision import wire
from dreambooth.serving.supervision.messages import FromEngine

# Some twenty pictures of the largest size. The server reads all the time; the queue fills only if
# the server is blocked for long, and then the engine has to wait for it.
MOST_BYTES: Final = 256 * MIB
_MOST_AT_ONCE: Final = 64  # frames; IOV_MAX allows 1,024 pieces


class SendQueue:
    """The messages to be sent; every method may be called from any thread."""

    def __init__(self, connection: socket.socket, *, most_bytes: int = MOST_BYTES) -> None:
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
        frame = wire.pack(message)
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
