from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from dreambooth.serving.http.guard import Guard, GuardLimits, guarded

QUICK = GuardLimits(head_s=0.3, body_s=0.3, idle_s=1, linger_s=0.5, write_s=0.3, write_bytes=4096)
POST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


@dataclass
class Served:
    """A guarded port and what its application received."""

    guard: Guard
    port: int = 0
    state: ServerState = field(default_factory=ServerState)
    bodies: list[bytes] = field(default_factory=list)
    disconnects: int = 0
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    release: asyncio.Event = field(default_factory=asyncio.Event)
    answer: bytes = b"done"
    reads_body: bool = True
    watches: bool = False  # reads on until the client leaves
    closes: bool = False
    clients: list[asyncio.StreamWriter] = field(default_factory=list)

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        self.headers = scope["headers"]
        while self.reads_body:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.disconnects += 1
                return
            body += message["body"]
            if not message["more_body"] and not self.watches:
                break
        self.bodies.append(body)
        await self.release.wait()
        headers = [(b"content-length", str(len(self.answer)).encode())]
        headers += [(b"connection", b"close")] if self.closes else []
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": self.answer})

    async def open(self, limit: int = 2**24) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=limit)
        self.clients.append(writer)
        return reader, writer


@contextlib.asynccontextmanager
async def serving(limits: GuardLimits = QUICK, **changes: Any) -> AsyncIterator[Served]:
    served = Served(guard=Guard(limits), **changes)
    served.release.set()
    config = uvicorn.Config(
        served.app,
        interface="asgi3",
        ws="none",
        log_config=None,
        access_log=False,
        timeout_keep_alive=limits.idle_s,
    )
    protocol = guarded(served.guard)
    server = await asyncio.get_running_loop().create_server(
        lambda: protocol(config=config, server_state=served.state, app_state={}), "127.0.0.1", 0
    )
    served.port = server.sockets[0].getsockname()[1]
    try:
        yield served
    finally:
        server.close()
        for client in served.clients:
            client.transport.abort()
        for _ in range(100):
            if not served.state.connections and not served.state.tasks:
                break
            await asyncio.sleep(0.01)
        assert not served.state.connections


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))


def status_of(reply: bytes) -> int:
    return int(reply.split(b" ", 2)[1]) if reply else 0


def error_of(reply: bytes) -> dict[str, Any]:
    found = json.loads(reply.partition(b"\r\n\r\n")[2])
    assert isinstance(found, dict)
    assert set(found) >= {"code", "type", "message", "request_id"}
    return found


async def reply_to(served: Served, *pieces: bytes, pause_s: float = 0.0) -> bytes:
    """Send the pieces, read until the server closes, and close."""
    reader, writer = await served.open()
    for piece in pieces:
        writer.write(piece)
        await asyncio.sleep(pause_s)
    reply = await reader.read()
    writer.close()
    return reply


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: x\r\n"])
def test_a_head_that_never_ends_is_closed(sent: bytes) -> None:
    async def test() -> None:
        async with serving() as served:
            reply = await reply_to(served, sent) if sent else await reply_to(served)
            assert status_of(reply) == (408 if sent else 0)
            assert served.guard.refused == {"slow head" if sent else "no request": 1}
            assert served.bodies == []

    run(test)


def test_a_head_that_drips_is_closed_though_bytes_keep_coming() -> None:
    async def test() -> None:
        async with serving() as served:
            _, writer = await served.open()
            writer.write(b"GET / HTTP/1.1\r\n")
            for _ in range(12):
                writer.write(b"X-Drip: x\r\n")
                await asyncio.sleep(0.05)
            assert served.guard.refused == {"slow head": 1}
            assert not served.state.connections

    run(test)


def test_a_body_that_drips_is_closed_and_its_application_is_reported() -> None:
    async def test() -> None:
        async with serving() as served:
            assert status_of(await reply_to(served, POST % 100, b"x", pause_s=0.01)) == 408
            await asyncio.sleep(0.05)
            assert served.disconnects == 1
            assert served.guard.refused == {"slow body": 1}

    run(test)


def test_a_body_in_pieces_within_the_time_is_read_whole() -> None:
    async def test() -> None:
        async with serving() as served:
            reader, writer = await served.open()
            for piece in (POST % 6, b"ab", b"cd", b"ef"):
                writer.write(piece)
                await asyncio.sleep(0.03)
            assert (await reader.readuntil(b"done")).startswith(b"HTTP/1.1 200")
            assert served.bodies == [b"abcdef"]

    run(test)


def test_a_connection_is_kept_for_the_next_request_and_closed_when_idle() -> None:
    async def test() -> None:
        async with serving() as served:
            reader, writer = await served.open()
            for _ in range(3):
                writer.write(GET)
                await reader.readuntil(b"done")
                await asyncio.sleep(0.4)  # longer than a head may take, but shorter than idle_s
            assert await reader.read() == b""
            assert served.guard.refused == {}

    run(test)


def test_the_second_head_of_a_connection_has_its_own_time() -> None:
    async def test() -> None:
        async with serving() as served:
            reader, writer = await served.open()
            writer.write(GET)
            await reader.readuntil(b"done")
            await asyncio.sleep(0.1)
            writer.write(GET[:20])
            assert status_of(await reader.read()) == 408

    run(test)


@pytest.mark.parametrize("pieces", [1, 7])
def test_a_large_head_gets_431(pieces: int) -> None:
    async def test() -> None:
        head = b"GET / HTTP/1.1\r\n" + b"X-Large: " + b"x" * 40_000 + b"\r\n\r\n"
        size = len(head) // pieces + 1
        cut = [head[i : i + size] for i in range(0, len(head), size)]
        async with serving() as served:
            reply = await reply_to(served, *cut, pause_s=0.005)
            assert status_of(reply) == error_of(reply)["code"] == 431
            assert served.bodies == []

    run(test)


CHUNKED = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\ncat\r\n"


@pytest.mark.parametrize(
    "flood", [b"0\r\n" + b"T: x\r\n" * 40_000, b"1;" + b"e" * 240_000, b"1\r\na\r\n" * 40_000]
)
def test_a_body_that_is_mostly_wrapping_is_cut(flood: bytes) -> None:
    async def test() -> None:
        async with serving(replace(QUICK, body_s=20, body_bytes=200_000), watches=True) as served:
            reply = await reply_to(served, CHUNKED, flood, pause_s=0.05)
            assert status_of(reply) == 413
            assert "200000 bytes" in error_of(reply)["message"]
            assert served.guard.refused == {"large body": 1}
            assert served.disconnects == 1

    run(test)


def test_what_trails_the_last_chunk_is_no_header() -> None:
    async def test() -> None:
        async with serving() as served:
            reply = await reply_to(served, CHUNKED, b"0\r\nContent-Type: x\r\nT: x\r\n\r\n")
            assert status_of(reply) == 200
            assert served.bodies == [b"cat"]
            assert served.headers == [(b"host", b"x"), (b"transfer-encoding", b"chunked")]

    run(test)


def test_many_headers_get_431() -> None:
    async def test() -> None:
        head = b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: x\r\n" % i for i in range(101)) + b"\r\n"
        async with serving() as served:
            assert status_of(await reply_to(served, head)) == 431

    run(test)


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
        b"POST / HTTP/1.1\r\nContent-Length: -3\r\n\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
def test_what_is_no_http_gets_400_as_json(sent: bytes) -> None:
    async def test() -> None:
        async with serving() as served:
            reply = await reply_to(served, sent)
            assert status_of(reply) == error_of(reply)["code"] == 400
            assert served.guard.refused == {"malformed": 1}

    run(test)


def test_a_wish_to_upgrade_is_ignored_and_the_request_answered() -> None:
    async def test() -> None:
        ask = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
        async with serving() as served:
            reader, writer = await served.open()
            for _ in range(2):
                writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n" + ask + b"\r\n")
                assert status_of(await reader.readuntil(b"done")) == 200
                writer.write(b"POST / HTTP/1.1\r\nContent-Length: 2\r\n" + ask + b"\r\na")
                await asyncio.sleep(0.02)
                writer.write(b"b")
                assert status_of(await reader.readuntil(b"done")) == 200
            assert served.bodies == [b"", b"ab"] * 2

    run(test)


@pytest.mark.parametrize("apart", [True, False])
def test_a_second_request_at_once_is_not_served_and_the_first_is_answered(apart: bool) -> None:
    async def test() -> None:
        async with serving() as served:
            served.release.clear()
            reader, writer = await served.open()
            if apart:
                writer.write(GET)
                await asyncio.sleep(0.05)
                writer.write(GET * 500)
            else:
                writer.write(GET * 500)
            await asyncio.sleep(0.05)
            served.release.set()
            reply = await reader.read()
            assert reply.count(b"200 OK") == 1
            assert b"connection: close" in reply
            assert len(served.bodies) == 1

    run(test)


def test_an_early_reply_reaches_a_client_that_is_still_sending() -> None:
    async def test() -> None:
        async with serving(reads_body=False, closes=True) as served:
            reader, writer = await served.open()
            writer.write(POST % 3_000_000)
            for _ in range(30):
                writer.write(b"x" * 100_000)
                await writer.drain()
            assert (await reader.read()).endswith(b"done")
            writer.close()
            await asyncio.sleep(0.05)
            assert not served.state.connections

    run(test)


def test_lingering_ends_though_the_client_never_stops_sending() -> None:
    async def test() -> None:
        async with serving(reads_body=False, closes=True) as served:
            _, writer = await served.open()
            writer.write(POST % 10**12)
            start = asyncio.get_running_loop().time()
            with contextlib.suppress(ConnectionError):
                while True:
                    writer.write(b"x" * 65_536)
                    await writer.drain()
                    await asyncio.sleep(0.01)
            assert asyncio.get_running_loop().time() - start < 5

    run(test)


def test_a_reply_that_is_not_read_is_cut() -> None:
    async def test() -> None:
        async with serving(answer=b"x" * 30_000_000) as served:
            reader, writer = await served.open(limit=1024)
            writer.write(GET)
            await reader.read(1)
            await asyncio.sleep(1.5)
            assert served.guard.refused == {"slow reader": 1}
            assert not served.state.connections

    run(test)


def test_a_reply_that_is_read_slowly_but_surely_is_sent_whole() -> None:
    async def test() -> None:
        size = 12_000_000
        async with serving(answer=b"x" * size) as served:
            reader, writer = await served.open(limit=65_536)
            writer.write(GET)
            got = len(await reader.readuntil(b"\r\n\r\n")) * 0
            while got < size:
                got += len(await reader.read(200_000))
                # The whole reply takes longer than two of the guard's checks.
                await asyncio.sleep(0.015)
            assert got == size
            assert served.guard.refused == {}

    run(test)


BODY = POST % 9 + b"{"


def test_one_connection_too_many_gets_503_and_leaves_those_at_work_alone() -> None:
    async def test() -> None:
        limits = replace(QUICK, connections=3, head_s=5, body_s=5)
        async with serving(limits) as served:
            served.release.clear()
            held = [await served.open() for _ in range(3)]
            for (_, writer), sent in zip(held, (GET, GET, BODY), strict=True):
                writer.write(sent)
            await asyncio.sleep(0.05)
            assert not served.guard.owing
            reply = await reply_to(served, GET)
            assert status_of(reply) == error_of(reply)["code"] == 503
            assert served.guard.refused == {"connections": 1}
            served.release.set()
            held[2][1].write(b"x" * 8)
            for reader, _ in held:
                assert (await reader.readuntil(b"done")).startswith(b"HTTP/1.1 200")
            held[1][1].close()
            await asyncio.sleep(0.05)
            reader, writer = await served.open()
            writer.write(GET)
            assert (await reader.readuntil(b"done")).startswith(b"HTTP/1.1 200")
            assert served.guard.refused == {"connections": 1}

    run(test)


@pytest.mark.parametrize(
    "sent",
    list(itertools.product([b"", GET, GET[:9], GET + GET[:9]], repeat=2)),
    ids=repr,
)
def test_the_connection_that_owes_a_head_for_longest_gives_way(sent: tuple[bytes, ...]) -> None:
    """Each of the first two is silent, kept alive, or in the middle of its first or second head."""

    async def test() -> None:
        async with serving(replace(QUICK, connections=3, head_s=5)) as served:
            held = []
            for piece in sent:
                reader, writer = await served.open()
                if GET in piece:
                    writer.write(GET)
                    assert (await reader.readuntil(b"done")).startswith(b"HTTP/1.1 200")
                writer.write(piece.removeprefix(GET))
                await asyncio.sleep(0.02)
                held.append(reader)
            served.release.clear()
            busy, writer = await served.open()
            writer.write(GET)
            await asyncio.sleep(0.02)
            for reader, piece in zip(held, sent, strict=True):
                newest, writer = await served.open()
                reply = await reader.read()
                partial = piece.removeprefix(GET) != b""
                assert status_of(reply) == (503 if partial else 0)
            assert sum(served.guard.refused.values()) == 2
            served.release.set()
            writer.write(GET)
            for reader in (busy, newest):
                assert (await reader.readuntil(b"done")).startswith(b"HTTP/1.1 200")
            assert len(served.guard.owing) == 3, "the last but one is still silent"

    run(test)


def test_a_closed_connection_owes_nothing() -> None:
    async def test() -> None:
        async with serving(replace(QUICK, connections=4)) as served:
            for piece in (b"", GET, GET[:9], BODY, b"nonsense\r\n\r\n"):
                _, writer = await served.open()
                writer.write(piece)
                await asyncio.sleep(0.02)
                writer.transport.abort()
            await asyncio.sleep(0.05)
            assert not served.guard.owing

    run(test)


def test_a_client_that_leaves_is_noticed_while_its_request_is_worked_on() -> None:
    async def test() -> None:
        async with serving(watches=True) as served:
            _, writer = await served.open()
            writer.write(GET)
            await asyncio.sleep(0.05)
            assert served.disconnects == 0
            writer.transport.abort()
            await asyncio.sleep(0.1)
            assert served.disconnects == 1

    run(test)
