from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

import numpy as np
import pytest

from dreambooth.errors import ResourceError, UnavailableError
from dreambooth.serving.contract.reply import Picture
from dreambooth.serving.supervision.admission import EngineSpeed, Work
from dreambooth.serving.supervision.messages import Done, Drawn, Failed, Fault
from dreambooth.serving.supervision.pending_requests import (
    PendingRequest,
    PendingRequests,
    ProtocolError,
)

PACE = EngineSpeed(seconds_per_call=((1, 1.0),), seconds_per_decode=1.0, rows=2, pixels=64)


def in_a_loop(test: Callable[[], Coroutine[None, None, None]]) -> Callable[[], None]:
    return lambda: asyncio.run(test())


def pending_request(request_id: int = 1, pictures: int = 2, steps: int = 10) -> PendingRequest:
    work = Work(request_id=request_id, rows=1, steps=steps, width=8, height=16)
    return PendingRequest((work,) * pictures)


def drawn(
    index: int, request_id: int = 1, value: int = 7, shape: tuple[int, int] = (16, 8)
) -> Drawn:
    pixels = np.full((*shape, 3), value, np.uint8)
    picture = Picture(pixels=pixels, seed=40 + index, finish_reason="SUCCESS", exact=False)
    return Drawn(request_id=request_id, index=index, picture=picture)


@in_a_loop
async def test_pictures_come_in_any_order_and_go_in_theirs() -> None:
    pending, one = PendingRequests(), pending_request()
    pending.add(one)
    pending.take(drawn(1))
    assert not one.result.done()
    assert len(pending.ahead()) == 1
    pending.take(drawn(0, value=9))
    assert one.result.done()  # before Done, which would take another pass of the event loop
    pending.take(Done(request_id=1))
    pictures = await one.result
    assert [picture.seed for picture in pictures] == [40, 41]
    assert pictures[0].pixels.shape == (16, 8, 3)
    assert pictures[0].pixels.dtype == np.uint8
    assert (pictures[0].pixels == 9).all()
    assert not pictures[0].exact
    pending.remove(one)
    assert (len(pending), pending.picture_count) == (0, 0)


@in_a_loop
async def test_what_nobody_waits_for_is_dropped() -> None:
    pending = PendingRequests()
    for message in (drawn(0), Done(request_id=1), Failed(request_id=1, fault=Fault.of(OSError()))):
        pending.take(message)
    one = pending_request()
    pending.add(one)
    one.result.cancel()
    pending.take(Failed(request_id=1, fault=Fault.of(OSError())))
    for index in (0, 1):
        pending.take(drawn(index))
    pending.take(Done(request_id=1))
    assert pending.fail_all("gone", 1.0) == 0


@in_a_loop
async def test_an_engine_that_breaks_the_protocol_gets_an_error() -> None:
    pending = PendingRequests()
    pending.add(pending_request())
    pending.take(drawn(0))
    for message in (
        drawn(0),
        drawn(2),
        drawn(-1),
        drawn(1, shape=(8, 16)),
        Done(request_id=1),
    ):
        with pytest.raises(ProtocolError):
            pending.take(message)


@in_a_loop
async def test_the_engines_errors_reach_the_one_request() -> None:
    pending, one, other = PendingRequests(), pending_request(1), pending_request(2)
    pending.add(one)
    pending.add(other)
    pending.take(Failed(request_id=1, fault=Fault.of(ResourceError("no memory"))))
    with pytest.raises(ResourceError, match="no memory"):
        await one.result
    assert not other.result.done()


@in_a_loop
async def test_when_the_engine_is_lost_each_request_gets_an_error_of_its_own() -> None:
    pending, one, other, answered = (
        PendingRequests(),
        pending_request(1),
        pending_request(2),
        pending_request(3, pictures=1),
    )
    for each in (one, other, answered):
        pending.add(each)
    pending.take(drawn(0, request_id=3))
    pending.take(Done(request_id=3))
    assert pending.fail_all("gone", 2.5) == 2
    errors = [each.result.exception() for each in (one, other)]
    assert errors[0] is not errors[1]
    for error in errors:
        assert isinstance(error, UnavailableError)
        assert error.retry_after_s == 2.5
    assert len(await answered.result) == 1


@in_a_loop
async def test_the_calls_that_the_engine_made_shorten_what_is_ahead() -> None:
    pending = PendingRequests()
    for number in (1, 2):
        pending.add(pending_request(number, steps=10))
    assert [work.steps for work in pending.ahead()] == [10, 10, 10, 10]
    pending.calls_were_made(4, PACE)  # each call advances two rows
    assert [work.steps for work in pending.ahead()] == [6, 6, 10, 10]
    pending.take(drawn(0))
    pending.calls_were_made(8, PACE)
    assert [work.steps for work in pending.ahead()] == [0, 2, 8]
