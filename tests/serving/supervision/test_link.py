"""The two ends of the engine's socket: split data, back-pressure, closing (see `test_messages`)."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from dreambooth.diffusion.sampling_request import SamplingRequest
from dreambooth.serving.contract.reply import Picture
from dreambooth.serving.supervision import link
from dreambooth.serving.supervision.link import Link, SendQueue
from dreambooth.serving.supervision.messages import (
    Cancel,
    Done,
    Drawn,
    FromEngine,
    Generate,
    WireError,
    pack,
)

SIZE = sum(map(len, pack(Done(request_id=1000))))
LONG_S = 30.0


def picture(number: int, width: int = 300) -> Drawn:
    pixels = np.full((200, width, 3), (number % 256, 1, 2), np.uint8)
    drawn = Picture(pixels=pixels, seed=number, finish_reason="SUCCESS")
    return Drawn(request_id=1, index=number, picture=drawn)


def sent(*messages: Drawn | Done) -> bytes:
    return b"".join(part for message in messages for part in pack(message))


async def received(one: Link) -> Drawn | Done:
    message = await one.receive()
    assert isinstance(message, Drawn | Done)
    return message


def linked(work: Callable[[Link, socket.socket], Awaitable[None]]) -> None:
    async def run() -> None:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        loop = asyncio.get_running_loop()
        _, one = await loop.create_unix_connection(Link, sock=ours)
        with theirs:
            async with asyncio.timeout(LONG_S):
                await work(one, theirs)
        one.abort()
        await one.wait_closed()

    asyncio.run(run())


@pytest.mark.parametrize("piece", [1, 11, 13, 4_096, 180_000, 10**7])
def test_frames_arrive_whole_however_their_bytes_are_cut(piece: int) -> None:
    messages = [Done(request_id=1), picture(1), Done(request_id=2), picture(2), picture(3)]
    if piece == 1:
        messages = [Done(request_id=1), picture(1, width=1), Done(request_id=2)]
    data = sent(*messages)

    async def work(one: Link, theirs: socket.socket) -> None:
        async def write() -> None:
            for begin in range(0, len(data), piece):
                await asyncio.get_running_loop().sock_sendall(theirs, data[begin : begin + piece])
                await asyncio.sleep(0)

        writing = asyncio.create_task(write())
        assert sent(*[await received(one) for _ in messages]) == sent(*messages)
        await writing

    linked(work)


def test_an_engine_that_sends_while_nobody_reads_has_to_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(link, "MOST_BYTES", 500_000)
    messages = [picture(i) for i in range(40)]  # 180 kB each

    async def work(one: Link, theirs: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        writing = asyncio.create_task(loop.sock_sendall(theirs, sent(*messages)))
        _, unfinished = await asyncio.wait([writing], timeout=0.3)
        assert unfinished
        assert sent(*[await received(one) for _ in messages]) == sent(*messages)
        await writing

    linked(work)


def test_messages_before_a_malformed_one_are_still_received() -> None:
    async def work(one: Link, theirs: socket.socket) -> None:
        theirs.sendall(sent(Done(request_id=7)) + b"GET / HTTP/1.1\r\n\r\n")
        assert await one.receive() == Done(request_id=7)
        for _ in range(2):
            with pytest.raises(WireError, match="GET"):
                await one.receive()

    linked(work)


def test_a_waiting_sender_learns_that_the_link_ended() -> None:
    async def work(one: Link, theirs: socket.socket) -> None:
        waiting = asyncio.create_task(one.receive())
        await asyncio.sleep(0.01)
        theirs.sendall(sent(picture(1))[:-1])
        theirs.close()
        assert await waiting is None
        await one.wait_closed()
        one.send(Cancel(request_id=1))  # the engine is gone: no error
        await one.drain()

    linked(work)


def test_a_sender_waits_for_an_engine_that_does_not_read_and_no_longer_than_it_lives() -> None:
    text = "p" * 4_000_000

    async def work(one: Link, theirs: socket.socket) -> None:
        one.send(
            Generate(
                request_id=1, pictures=(SamplingRequest(prompt=text, seed=1),), batch_size=None
            )
        )
        draining = asyncio.create_task(one.drain())
        _, unfinished = await asyncio.wait([draining], timeout=0.2)
        assert unfinished
        theirs.close()
        await draining

    linked(work)


# The engine's end.


def all_received(connection: socket.socket) -> list[FromEngine]:
    async def read() -> list[FromEngine]:
        loop = asyncio.get_running_loop()
        _, one = await loop.create_unix_connection(Link, sock=connection)
        messages = []
        while (message := await one.receive()) is not None:
            messages.append(message)
        return messages

    return asyncio.run(read())


def test_messages_of_all_threads_arrive_whole_and_in_each_ones_order() -> None:
    ours, theirs = socket.socketpair()
    send_queue = SendQueue(theirs)

    def put(first: int) -> None:
        for i in range(first, first + 200):
            send_queue.put(Done(request_id=i))

    with ThreadPoolExecutor() as pool:
        reading = pool.submit(all_received, ours)
        list(pool.map(put, range(1000, 5000, 1000)))
        send_queue.close(LONG_S)
        theirs.close()
        messages = reading.result(LONG_S)
    numbers = [message.request_id for message in messages if isinstance(message, Done)]
    assert len(numbers) == 800
    for n in range(1, 5):
        assert [i for i in numbers if i // 1000 == n] == list(range(1000 * n, 1000 * n + 200))


def test_it_holds_so_many_bytes_and_then_makes_the_engine_wait() -> None:
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    send_queue = SendQueue(theirs, most_bytes=2 * SIZE)
    count, all_put = 2_000, threading.Event()

    def put() -> None:
        for _ in range(count):
            send_queue.put(Done(request_id=1000))
        all_put.set()

    threading.Thread(target=put, daemon=True).start()
    assert not all_put.wait(0.5)  # nobody reads yet
    with ThreadPoolExecutor() as pool:
        reading = pool.submit(all_received, ours)
        assert all_put.wait(LONG_S)
        send_queue.close(LONG_S)
        theirs.close()
        assert len(reading.result(LONG_S)) == count


def test_a_message_larger_than_the_bound_goes_alone() -> None:
    ours, theirs = socket.socketpair()
    send_queue = SendQueue(theirs, most_bytes=1)
    for i in range(3):
        send_queue.put(Done(request_id=i))
    send_queue.close(LONG_S)
    theirs.close()
    assert len(all_received(ours)) == 3


def test_pictures_that_the_socket_takes_in_pieces_arrive_whole() -> None:
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    send_queue = SendQueue(theirs)
    pixels = [np.full((300, 40 + i, 3), i, np.uint8) for i in range(100)]
    with ThreadPoolExecutor() as pool:
        for i, each in enumerate(pixels):
            one = Picture(pixels=each, seed=i, finish_reason="SUCCESS")
            send_queue.put(Drawn(request_id=1, index=i, picture=one))
        reading = pool.submit(all_received, ours)
        send_queue.close(LONG_S)
        theirs.close()
        drawn = [one.picture for one in reading.result(LONG_S) if isinstance(one, Drawn)]
    assert [each.seed for each in drawn] == list(range(100))
    for each, whole in zip(drawn, pixels, strict=True):
        assert np.array_equal(each.pixels, whole)


def test_nobody_waits_for_a_server_that_is_gone() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        send_queue = SendQueue(theirs, most_bytes=SIZE)
        ours.close()
        for i in range(100):
            send_queue.put(Done(request_id=i))
        send_queue.close(LONG_S)
