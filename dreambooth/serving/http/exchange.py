"""Represent one HTTP request in the routes: read its body up to a limit, and watch its client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import TypeVar

from starlette.datastructures import Headers
from starlette.types import Receive, Scope

from dreambooth.errors import RequestError
from dreambooth.serving.contract.error_reply import new_request_id

T = TypeVar("T")


class ClientLeft(Exception):
    """The connection was lost before the reply."""


class Exchange:
    """A request with the facts for its log line; `pictures` is how many were drawn for it."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self.path: str = scope["path"]
        self.method: str = scope["method"]
        self.headers = Headers(scope=scope)
        self.request_id = new_request_id()
        self.pictures = 0
        self._receive = receive
        self._started = time.monotonic()
        self._body_read = False

    @property
    def seconds(self) -> float:
        """Return the seconds since the request's head was read."""
        return time.monotonic() - self._started

    def has_unread_body(self) -> bool:
        """Return whether bytes of this request's body may still come on the connection."""
        announced = self.headers.get("content-length", "0") != "0"
        return not self._body_read and (announced or "transfer-encoding" in self.headers)

    async def body(self, most: int) -> bytes:
        """Read the body, but never more than about `most` bytes of it.

        Raises ClientLeft, or RequestError with 413 for a longer body (before the first byte is read
        if its length is announced) and 415 for a compressed one.
        """
        for name, plain in (("Content-Encoding", "identity"), ("Transfer-Encoding", "chunked")):
            encoding = ", ".join(self.headers.getlist(name)).strip().lower()
            if encoding not in ("", plain):
                raise RequestError(
                    f"{name} {encoding[:40]!r} is not read: send the body as it is.", 415
                )
        too_long = RequestError(f"The body is too long: at most {most} bytes are read.", 413)
        length = self.headers.get("content-length", "")
        if length.isdecimal() and int(length) > most:
            raise too_long
        body = bytearray()
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientLeft
            body += message.get("body", b"")
            if len(body) > most:
                raise too_long
            if not message.get("more_body", False):
                self._body_read = True
                return bytes(body)

    async def unless_client_leaves(self, work: Coroutine[object, object, T]) -> T:
        """Return the result of `work`; if the client leaves, cancel it and raise ClientLeft."""
        working = asyncio.create_task(work)
        watching = asyncio.create_task(self._lost())
        try:
            await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            raise ClientLeft
        finally:
            watching.cancel()
            if not working.done():
                working.cancel()
                await asyncio.gather(working, watching, return_exceptions=True)

    async def _lost(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
