from __future__ import annotations

import asyncio
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from dreambooth.serving.contract.reply import Picture
from dreambooth.serving.supervision import wire
from dreambooth.serving.supervision.link import Link
from dreambooth.serving.supervision.messages import Done, Drawn, FromEngine
from dreambooth.serving.supervision.send_queue import SendQueue

SIZE = sum(map(len, wire.pack(Done(request_id=1000))))
LONG_S = 30.0


def received(connection: socket.socket) -> list[FromEngine]:
    async def read() -> list[FromEngine]:
        loop = asyncio.get_running_loop()
        _, link = await loop.create_unix_connection(Link, sock=connection)
        messages = []
        while (message := await link.receive()) is not None:
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
        reading = pool.submit(received, ours)
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
        reading = pool.submit(received, ours)
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
    assert len(received(ours)) == 3


def test_pictures_that_the_socket_takes_in_pieces_arrive_whole() -> None:
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    send_queue = SendQueue(theirs)
    pixels = [np.full((300, 40 + i, 3), i, np.uint8) for i in range(100)]
    with ThreadPoolExecutor() as pool:
        for i, each in enumerate(pixels):
            picture = Picture(pixels=each, seed=i, finish_reason="SUCCESS")
            send_queue.put(Drawn(request_id=1, index=i, picture=picture))
        reading = pool.submit(received, ours)
        send_queue.close(LONG_S)
        theirs.close()
        drawn = [one.picture for one in reading.result(LONG_S) if isinstance(one, Drawn)]
    assert [picture.seed for picture in drawn] == list(range(100))
    for picture, sent in zip(drawn, pixels, strict=True):
        assert np.array_equal(picture.pixels, sent)


def test_nobody_waits_for_a_server_that_is_gone() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        send_queue = SendQueue(theirs, most_bytes=SIZE)
        ours.close()
        for i in range(100):
            send_queue.put(Done(request_id=i))
        send_queue.close(LONG_S)
