from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreambooth.diffusion.sampling_request import SamplingRequest
from dreambooth.limits import LIMITS
from dreambooth.serving.contract.engine_status import EngineStatus
from dreambooth.serving.supervision import wire
from dreambooth.serving.supervision.link import Link
from dreambooth.serving.supervision.messages import (
    Cancel,
    Close,
    Done,
    Drawn,
    Failed,
    Fault,
    FromEngine,
    Generate,
    LoadFailed,
    Ready,
    ToEngine,
)
from dreambooth.serving.supervision.wire import WireError

FAULT = Fault(error="RequestError", message="no", status=400)
STATUS = EngineStatus(
    queued_pictures=1,
    running_rows=2,
    calls_total=3,
    pictures_total=4,
    out_of_memory_total=5,
    seconds_per_call=((1, 0.5), (8, 1.25)),
    undecoded=7,
    seconds_per_decode=0.125,
    rss_bytes=6,
)
DRAWN = Drawn(
    request_id=1,
    index=2,
    width=2,
    height=1,
    seed=2**64 - 1,
    finish_reason="BLACK",
    exact=False,
    pixels=b"\x00\xffDBf1",
)
EVERY_MESSAGE: list[Any] = [
    Generate.of(1, [SamplingRequest(prompt="a cat", seed=2**64 - 1, width=64, height=8)], 3),
    Generate.of(2, [SamplingRequest(prompt="\ud800 \U0001f600 \x00", seed=0)], None),
    Generate.of(4, [SamplingRequest(prompt="", seed=0, guidance_scale=-1.7e308)], None),
    Cancel(request_id=3),
    Close(),
    Ready(seconds_per_call=((1, 0.1), (2, 0.15)), seconds_per_decode=0.2, rows=2),
    LoadFailed(fault=FAULT),
    DRAWN,
    Done(request_id=4),
    Failed(request_id=5, fault=FAULT),
    STATUS,
]


def sent(message: Any) -> bytes:
    return b"".join(wire.pack(message))


def split(data: bytes) -> tuple[bytes, bytes]:
    _, header, payload = struct.unpack("!4sII", data[:12])
    assert len(data) == 12 + header + payload
    return data[12 : 12 + header], data[12 + header :]


async def read(data: bytes) -> FromEngine | None:
    """Return the first message that the server's end of the socket reads from these bytes."""
    ours, theirs = socket.socketpair()
    loop = asyncio.get_running_loop()
    _, link = await loop.create_unix_connection(Link, sock=ours)
    with theirs:
        theirs.setblocking(False)
        with contextlib.suppress(OSError):  # it may be refused half-way
            await loop.sock_sendall(theirs, data)
    try:
        return await link.receive()
    finally:
        link.abort()
        await link.wait_closed()


@pytest.mark.parametrize("message", EVERY_MESSAGE, ids=lambda message: type(message).__name__)
def test_every_message_arrives_as_it_was_sent(message: Any) -> None:
    kinds = ToEngine if isinstance(message, ToEngine) else FromEngine
    assert wire.unpack(*split(sent(message)), kinds) == message


def test_every_kind_of_message_is_in_this_test() -> None:
    kinds = {*get_args(ToEngine), *get_args(FromEngine)}
    assert {type(message) for message in EVERY_MESSAGE} == kinds


def test_messages_follow_each_other_over_a_socket_in_both_directions() -> None:
    async def both() -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            loop = asyncio.get_running_loop()
            _, link = await loop.create_unix_connection(Link, sock=ours)
            for message in EVERY_MESSAGE:
                if isinstance(message, ToEngine):
                    link.send(message)
                    await link.drain()
                    assert await asyncio.to_thread(wire.to_engine, theirs) == message
                else:
                    theirs.sendall(sent(message))
                    assert await link.receive() == message
            link.abort()
            await link.wait_closed()
            assert wire.to_engine(theirs) is None

    asyncio.run(both())


@pytest.mark.parametrize("length", [0, 3, 12, 40, len(sent(DRAWN)) - 1])
def test_a_frame_that_breaks_off_is_the_end(length: int) -> None:
    assert asyncio.run(read(sent(DRAWN)[:length])) is None
    ours, theirs = socket.socketpair()
    with theirs:
        ours.sendall(sent(Cancel(request_id=1))[: min(length, 20)])
        ours.close()
        assert wire.to_engine(theirs) is None


def test_a_picture_of_the_largest_size_fits_into_a_frame() -> None:
    width = LIMITS.max_generated_side_pixels
    height = LIMITS.max_generated_pixels // width
    pixels = bytes(3 * width * height)
    message = Drawn(
        request_id=1,
        index=0,
        width=width,
        height=height,
        seed=0,
        finish_reason="SUCCESS",
        exact=True,
        pixels=pixels,
    )
    assert asyncio.run(read(sent(message))) == message


def test_texts_travel_once_however_many_pictures_have_them() -> None:
    pictures = [SamplingRequest(prompt="p" * 10_000, seed=i) for i in range(64)]
    message = Generate.of(1, pictures, None)
    assert len(sent(message)) < 25_000
    assert message.sampling_requests() == tuple(pictures)


def test_a_message_that_no_frame_can_hold_is_not_sent() -> None:
    picture = SamplingRequest(prompt="p" * wire.MAX_HEADER_BYTES, seed=1)
    with pytest.raises(WireError, match="too long"):
        wire.pack(Generate.of(1, [picture], None))


@pytest.mark.parametrize(
    "prefix",
    [
        struct.pack("!4sII", b"HTTP", 2, 0),
        struct.pack("!4sII", b"DBf1", wire.MAX_HEADER_BYTES + 1, 0),
        struct.pack("!4sII", b"DBf1", 2, wire.MAX_PAYLOAD_BYTES + 1),
    ],
)
def test_what_is_no_frame_is_refused_before_it_is_read(prefix: bytes) -> None:
    with pytest.raises(WireError):
        asyncio.run(read(prefix + bytes(100)))


def changed(message: Any, **fields: object) -> bytes:
    header, _ = split(sent(message))
    return json.dumps({**json.loads(header), **fields}).encode()


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xff",
        b"[]",
        b"null",
        b"{}",
        b'{"kind": "Exception"}',
        b'{"kind": ["Done"]}',
        b'{"kind": "Cancel", "request_id": 1}',  # the engine never sends this
        b'{"kind": "Done"}',
        b'{"kind": "Done", "request_id": "1"}',
        b'{"kind": "Done", "request_id": true}',
        b'{"kind": "Done", "request_id": 1.0}',
        b'{"kind": "Done", "request_id": 1, "more": 2}',
        b'{"kind": "Done", "request_id": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"kind": "Done", "request_id": ' + b"9" * 10_000 + b"}",
        changed(STATUS, seconds_per_call=[[1, float("nan")]]),
        changed(STATUS, seconds_per_call=[[1, 10**1000]]),
        changed(STATUS, seconds_per_call=[[1]]),
        changed(STATUS, seconds_per_call={"1": 2}),
        changed(STATUS, rss_bytes=None),
        changed(Failed(request_id=1, fault=FAULT), fault={"error": "x"}),
        changed(Failed(request_id=1, fault=FAULT), fault=3),
    ],
)
def test_a_header_that_is_none_of_the_engines_messages_is_refused(header: bytes) -> None:
    with pytest.raises(WireError):
        wire.unpack(header, b"", FromEngine)


@pytest.mark.parametrize(
    "fields",
    [
        {"width": 3},
        {"width": -2, "height": -1},
        {"width": 0, "height": 0},
        {"finish_reason": "FINE"},
        {"finish_reason": ["BLACK"]},
        {"exact": 1},
    ],
)
def test_a_picture_that_is_none_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(WireError):
        wire.unpack(changed(DRAWN, **fields), DRAWN.pixels, FromEngine)


def test_a_payload_beside_a_message_without_one_is_refused() -> None:
    with pytest.raises(WireError, match="payload"):
        wire.unpack(split(sent(Done(request_id=1)))[0], b"x", FromEngine)


@given(st.binary(max_size=200), st.sampled_from(EVERY_MESSAGE), st.data())
def test_random_bytes_are_the_end_or_a_wire_error_and_nothing_else(
    noise: bytes, message: Any, data: st.DataObject
) -> None:
    good = sent(message)
    at = data.draw(st.integers(0, len(good)))
    with contextlib.suppress(WireError):
        asyncio.run(read(good[:at] + noise + good[at + len(noise) :]))
