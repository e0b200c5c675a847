"""Sends requests to an ASGI application as they stand, with any header, without a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from starlette.types import ASGIApp, Message

HOST = "127.0.0.1:7860"
ORIGIN = f"http://{HOST}"


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def send(
    app: ASGIApp,
    method: str,
    target: str,
    *,
    body: Iterable[bytes] = (),
    host: str | None = HOST,
    origin: str | None = ORIGIN,
    more: Iterable[tuple[str, str]] = (),
) -> Reply:
    return asyncio.run(sent(app, method, target, body=body, host=host, origin=origin, more=more))


async def sent(
    app: ASGIApp,
    method: str,
    target: str,
    *,
    body: Iterable[bytes] = (),
    host: str | None = HOST,
    origin: str | None = ORIGIN,
    more: Iterable[tuple[str, str]] = (),
) -> Reply:
    path, _, query = target.partition("?")
    headers = [("host", host), ("origin", origin), *more]
    chunks = [*body, b""]
    messages = [
        {"type": "http.request", "body": chunk, "more_body": i < len(chunks) - 1}
        for i, chunk in enumerate(chunks)
    ]
    replies: list[Message] = []

    async def receive() -> Message:
        return messages.pop(0) if messages else await asyncio.Event().wait()

    async def keep(message: Message) -> None:
        replies.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": unquote(path),
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers if value],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 7860),
    }
    await app(scope, receive, keep)
    return Reply(
        replies[0]["status"],
        {name.decode(): value.decode() for name, value in replies[0]["headers"]},
        b"".join(message.get("body", b"") for message in replies[1:]),
    )


def handshake(app: ASGIApp, headers: Iterable[tuple[str, str]]) -> str:
    """Ask for a websocket; return the type of the first message that answers."""
    replies: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def keep(message: Message) -> None:
        replies.append(message)

    scope = {
        "type": "websocket",
        "path": "/_nicegui_ws/socket.io/",
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers],
    }
    asyncio.run(app(scope, receive, keep))
    return str(replies[0]["type"])
