from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace

import numpy as np
import pytest

from dreambooth.errors import ResourceError, UnavailableError
from dreambooth.serving.admission import Pace, Work
from dreambooth.serving.flights import Flight, Flights, ProtocolError
from dreambooth.serving.messages import Done, Drawn, Failed, Fault

PACE = Pace(seconds_per_call=((1, 1.0),), seconds_per_decode=1.0, rows=2, pixels=64)


def in_a_loop(test: Callable[[], Coroutine[None, None, None]]) -> Callable[[], None]:
    return lambda: asyncio.run(test())


def flight(request_id: int = 1, pictures: int = 2, steps: int = 10) -> Flight:
    work = Work(request_id=request_id, rows=1, steps=steps, width=8, height=16)
    return Flight((work,) * pictures)


def drawn(index: int, request_id: int = 1, value: int = 7) -> Drawn:
    return Drawn(
        request_id=request_id,
        index=index,
        width=8,
        height=16,
        seed=40 + index,
        finish_reason="SUCCESS",
        exact=False,
        pixels=bytes([value]) * (3 * 8 * 16),
    )


@in_a_loop
async def test_pictures_come_in_any_order_and_go_in_theirs() -> None:
    flights, one = Flights(), flight()
    flights.add(one)
    flights.take(drawn(1))
    assert not one.result.done()
    assert len(flights.ahead()) == 1
    flights.take(drawn(0, value=9))
    assert one.result.done()  # before Done, which takes another turn of the event loop
    flights.take(Done(request_id=1))
    pictures = await one.result
    assert [picture.seed for picture in pictures] == [40, 41]
    assert pictures[0].pixels.shape == (16, 8, 3)
    assert pictures[0].pixels.dtype == np.uint8
    assert (pictures[0].pixels == 9).all()
    assert not pictures[0].exact
    flights.remove(one)
    assert (len(flights), flights.picture_count) == (0, 0)


@in_a_loop
async def test_what_nobody_waits_for_is_dropped() -> None:
    flights = Flights()
    for message in (drawn(0), Done(request_id=1), Failed(request_id=1, fault=Fault.of(OSError()))):
        flights.take(message)
    one = flight()
    flights.add(one)
    one.result.cancel()
    flights.take(Failed(request_id=1, fault=Fault.of(OSError())))
    for index in (0, 1):
        flights.take(drawn(index))
    flights.take(Done(request_id=1))
    assert flights.fail_all("gone", 1.0) == 0


@in_a_loop
async def test_an_engine_that_breaks_the_rules_is_told_so() -> None:
    flights = Flights()
    flights.add(flight())
    flights.take(drawn(0))
    for message in (
        drawn(0),
        drawn(2),
        drawn(-1),
        replace(drawn(1), width=16, height=8),
        Done(request_id=1),
    ):
        with pytest.raises(ProtocolError):
            flights.take(message)


@in_a_loop
async def test_the_engines_errors_reach_the_one_request() -> None:
    flights, one, other = Flights(), flight(1), flight(2)
    flights.add(one)
    flights.add(other)
    flights.take(Failed(request_id=1, fault=Fault.of(ResourceError("no memory"))))
    with pytest.raises(ResourceError, match="no memory"):
        await one.result
    assert not other.result.done()


@in_a_loop
async def test_when_the_engine_is_lost_each_request_gets_an_error_of_its_own() -> None:
    flights, one, other, answered = Flights(), flight(1), flight(2), flight(3, pictures=1)
    for each in (one, other, answered):
        flights.add(each)
    flights.take(drawn(0, request_id=3))
    flights.take(Done(request_id=3))
    assert flights.fail_all("gone", 2.5) == 2
    errors = [each.result.exception() for each in (one, other)]
    assert errors[0] is not errors[1]
    for error in errors:
        assert isinstance(error, UnavailableError)
        assert error.retry_after_s == 2.5
    assert len(await answered.result) == 1


@in_a_loop
async def test_the_calls_that_the_engine_made_shorten_what_is_ahead() -> None:
    flights = Flights()
    for number in (1, 2):
        flights.add(flight(number, steps=10))
    assert [work.steps for work in flights.ahead()] == [10, 10, 10, 10]
    flights.calls_were_made(4, PACE)  # of two rows each
    assert [work.steps for work in flights.ahead()] == [6, 6, 10, 10]
    flights.take(drawn(0))
    flights.calls_were_made(8, PACE)
    assert [work.steps for work in flights.ahead()] == [0, 2, 8]
