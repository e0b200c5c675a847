from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreambooth.diffusion.sampling_request import SamplingRequest
from dreambooth.errors import ModelArtifactError, RequestError, ResourceError, UnavailableError
from dreambooth.limits import LIMITS
from dreambooth.serving.contract.engine_status import EngineStatus
from dreambooth.serving.contract.reply import Picture
from dreambooth.serving.supervision.link import Link, read_blocking
from dreambooth.serving.supervision.messages import (
    MAX_HEADER_BYTES,
    MAX_PAYLOAD_BYTES,
    Cancel,
    Close,
    Done,
    Drawn,
    EngineFaultError,
    Failed,
    Fault,
    FromEngine,
    Generate,
    LoadFailed,
    Ready,
    ToEngine,
    WireError,
    pack,
    unpack,
)

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
PIXELS = b"\x00\xffDBf1"
DRAWN = Drawn(
    request_id=1,
    index=2,
    picture=Picture(
        pixels=np.frombuffer(PIXELS, np.uint8).reshape(1, 2, 3),
        seed=2**64 - 1,
        finish_reason="BLACK",
        exact=False,
    ),
)


def generate(*pictures: SamplingRequest, batch_size: int | None = None) -> Generate:
    return Generate(request_id=1, pictures=pictures, batch_size=batch_size)


EVERY_MESSAGE: list[Any] = [
    generate(
        SamplingRequest(prompt="a", negative_prompt="b", seed=1, width=8, height=16, eta=0.5),
        SamplingRequest(prompt="b", num_inference_steps=3, guidance_scale=0.1, seed=2**64 - 1),
        batch_size=3,
    ),
    generate(SamplingRequest(prompt="\ud800 \ud83d\ude00 \U0001f600 \x00 \u2028 \x7f", seed=0)),
    generate(SamplingRequest(prompt="", seed=0, guidance_scale=-1.7e308)),
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
    return b"".join(pack(message))


def same(one: Any, other: Any) -> bool:
    """Return whether two messages are equal, the pixels of pictures too."""
    if isinstance(one, Drawn) and isinstance(other, Drawn):
        pictures = (one.picture, other.picture)
        named = [(p.seed, p.finish_reason, p.exact, p.pixels.dtype) for p in pictures]
        return (one.request_id, one.index, named[0]) == (
            other.request_id,
            other.index,
            named[1],
        ) and np.array_equal(pictures[0].pixels, pictures[1].pixels)
    return bool(one == other)


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
    assert same(unpack(*split(sent(message)), kinds), message)


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
                    assert await asyncio.to_thread(read_blocking, theirs) == message
                else:
                    theirs.sendall(sent(message))
                    assert same(await link.receive(), message)
            link.abort()
            await link.wait_closed()
            assert read_blocking(theirs) is None

    asyncio.run(both())


@pytest.mark.parametrize("length", [0, 3, 12, 40, len(sent(DRAWN)) - 1])
def test_a_frame_that_breaks_off_is_the_end(length: int) -> None:
    assert asyncio.run(read(sent(DRAWN)[:length])) is None
    ours, theirs = socket.socketpair()
    with theirs:
        ours.sendall(sent(Cancel(request_id=1))[: min(length, 20)])
        ours.close()
        assert read_blocking(theirs) is None


def test_a_picture_of_the_largest_size_fits_into_a_frame() -> None:
    width = LIMITS.max_generated_side_pixels
    height = LIMITS.max_generated_pixels // width
    pixels = np.zeros((height, width, 3), np.uint8)
    picture = Picture(pixels=pixels, seed=0, finish_reason="SUCCESS")
    message = Drawn(request_id=1, index=0, picture=picture)
    assert same(asyncio.run(read(sent(message))), message)


@pytest.mark.parametrize("character", ["\0", "\U0001f600"])
def test_the_longest_texts_of_a_request_fit_into_a_frame(character: str) -> None:
    text = character * LIMITS.max_prompt_characters
    pictures = [
        SamplingRequest(prompt=text, negative_prompt=text, seed=i)
        for i in range(LIMITS.max_request_pictures)
    ]
    assert 4 * len(sent(generate(*pictures))) < MAX_HEADER_BYTES


def test_a_message_that_no_frame_can_hold_is_not_sent() -> None:
    picture = SamplingRequest(prompt="p" * MAX_HEADER_BYTES, seed=1)
    with pytest.raises(WireError, match="too long"):
        pack(generate(picture))


@pytest.mark.parametrize(
    "prefix",
    [
        struct.pack("!4sII", b"HTTP", 2, 0),
        struct.pack("!4sII", b"DBf1", MAX_HEADER_BYTES + 1, 0),
        struct.pack("!4sII", b"DBf1", 2, MAX_PAYLOAD_BYTES + 1),
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
        unpack(header, b"", FromEngine)


@pytest.mark.parametrize(
    "fields",
    [
        {"pixels": [1, 3, 3]},
        {"pixels": [-1, -2, 3]},
        {"pixels": [0, 0, 3]},
        {"pixels": [1, 2, 1]},
        {"pixels": [2, 1, 3, 1]},
        {"pixels": [1.0, 2, 3]},
        {"pixels": [True, 2, 3]},
        {"pixels": 6},
        {"pixels": "AP8="},
        {"pixels": {}},
        {"width": 2},
        {"finish_reason": "FINE"},
        {"finish_reason": ["BLACK"]},
        {"exact": 1},
    ],
)
def test_a_picture_that_is_none_is_refused(fields: dict[str, object]) -> None:
    picture = json.loads(split(sent(DRAWN))[0])["picture"]
    assert same(unpack(changed(DRAWN, picture=picture), PIXELS, FromEngine), DRAWN)
    with pytest.raises(WireError):
        unpack(changed(DRAWN, picture=picture | fields), PIXELS, FromEngine)


@pytest.mark.parametrize("payload", [b"", PIXELS[1:], PIXELS + b"x"])
def test_a_picture_with_other_bytes_than_its_shape_has_is_refused(payload: bytes) -> None:
    with pytest.raises(WireError):
        unpack(split(sent(DRAWN))[0], payload, FromEngine)


def test_a_payload_beside_a_message_without_one_is_refused() -> None:
    with pytest.raises(WireError, match="payload"):
        unpack(split(sent(Done(request_id=1)))[0], b"x", FromEngine)


@given(st.binary(max_size=200), st.sampled_from(EVERY_MESSAGE), st.data())
def test_random_bytes_are_the_end_or_a_wire_error_and_nothing_else(
    noise: bytes, message: Any, data: st.DataObject
) -> None:
    good = sent(message)
    at = data.draw(st.integers(0, len(good)))
    with contextlib.suppress(WireError):
        asyncio.run(read(good[:at] + noise + good[at + len(noise) :]))


@pytest.mark.parametrize(
    "error",
    [
        RequestError("too large", 413),
        ResourceError("no memory"),
        UnavailableError("later", 2.5),
        ModelArtifactError("no model"),
    ],
)
def test_a_named_error_comes_out_as_it_went_in(error: Exception) -> None:
    copy = Fault.of(error).exception()
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    for name in ("status", "retry_after_s"):
        assert getattr(copy, name, None) == getattr(error, name, None)


def test_of_unknown_exceptions_only_the_class_is_reported() -> None:
    fault = Fault.of(KeyError("secret"))
    assert "secret" not in str(fault)
    assert isinstance(fault.exception(), EngineFaultError)


def test_an_error_class_that_nobody_knows_is_a_fault_of_the_engine() -> None:
    assert isinstance(Fault(error="SystemExit", message="x").exception(), EngineFaultError)
