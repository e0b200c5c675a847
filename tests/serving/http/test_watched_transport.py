from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Coroutine
from typing import Any, cast

from dreambooth.serving.http.watched_transport import WatchedTransport


class Recorder:
    """A transport that accepts everything at once and notes the calls made to it."""

    def __init__(self, *, connected: bool = True) -> None:
        self.asked: list[object] = []
        self.connected = connected

    def write(self, data: bytes) -> None:
        self.asked.append(data)

    def write_eof(self) -> None:
        if not self.connected:
            raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")
        self.asked.append("eof")

    def abort(self) -> None:
        self.asked.append("abort")

    def close(self) -> None:
        self.asked.append("close")

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return "close" in self.asked


class Owner:
    def __init__(self, *, gently: bool) -> None:
        self.gently = gently

    def closes_gently(self) -> bool:
        return self.gently

    def linger(self) -> None:
        assert self.gently

    def client_stopped_reading(self) -> None: ...


def watched(inner: Recorder, *, gently: bool = False) -> WatchedTransport:
    transport: Any = inner
    return WatchedTransport(
        cast(asyncio.Transport, transport),
        Owner(gently=gently),
        check_interval_s=10.0,
        least_bytes=1,
    )


def in_a_loop(test: Callable[[], Coroutine[None, None, None]]) -> Callable[[], None]:
    return lambda: asyncio.run(test())


@in_a_loop
async def test_head_and_body_go_out_in_one_call() -> None:
    inner = Recorder()
    transport = watched(inner)
    transport.write(b"head")
    transport.write(b"body")
    assert inner.asked == []
    assert transport.get_write_buffer_size() == 8
    transport.flush()
    assert inner.asked == [b"headbody"]
    assert transport.get_write_buffer_size() == 0
    await asyncio.sleep(0)
    assert inner.asked == [b"headbody"]


@in_a_loop
async def test_what_nobody_flushes_is_sent_in_the_next_loop_iteration() -> None:
    inner = Recorder()
    transport = watched(inner)
    for text in (b"first", b"second"):
        transport.write(text)
        await asyncio.sleep(0)
    assert inner.asked == [b"first", b"second"]


@in_a_loop
async def test_nothing_that_was_written_is_lost_by_closing() -> None:
    for gently, end in ((False, "close"), (True, "eof")):
        inner = Recorder()
        transport = watched(inner, gently=gently)
        transport.write(b"reply")
        transport.close()
        assert inner.asked == [b"reply", end]
        assert transport.is_closing()


@in_a_loop
async def test_a_connection_that_is_lost_is_written_to_no_more() -> None:
    inner = Recorder()
    transport = watched(inner)
    transport.write(b"reply")
    transport.forget()
    await asyncio.sleep(0)
    assert inner.asked == []


@in_a_loop
async def test_closing_gently_ends_at_once_where_the_client_was_reset() -> None:
    inner = Recorder(connected=False)
    transport = watched(inner, gently=True)
    transport.write(b"reply")
    transport.close()
    assert inner.asked == [b"reply", "abort"]
