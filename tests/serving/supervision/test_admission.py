from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dreambooth.serving.supervision.admission import (
    ADVISED,
    SAFETY,
    SHORTEST_RETRY_S,
    Bounds,
    EngineSpeed,
    Refusal,
    Work,
    after,
    calls,
    finish_times,
    refuse,
)

SIDE = 64
# A call of 1, 2, 3 or 4 rows takes 1, 1.5, 2 or 2.5 s; decoding takes 0.5 s.
PACE = EngineSpeed(
    seconds_per_call=((1, 1.0), (2, 1.5), (4, 2.5)),
    seconds_per_decode=0.5,
    rows=4,
    pixels=SIDE * SIDE,
)
BOUNDS = Bounds(max_queue=8, request_timeout_s=60.0)


def work(steps: int = 10, *, rows: int = 1, request: int = 1, side: int = SIDE) -> Work:
    return Work(request_id=request, rows=rows, steps=steps, width=side, height=side)


@pytest.mark.parametrize(
    ("rows", "seconds"), [(1, 1.0), (2, 1.5), (3, 2.0), (4, 2.5), (8, 5.0), (6, 3.75)]
)
def test_a_call_costs_what_was_measured_and_in_between_a_straight_line(
    rows: int, seconds: float
) -> None:
    assert PACE.seconds(rows, SIDE * SIDE) == pytest.approx(seconds)


def test_fewer_rows_than_were_measured_cost_as_much_as_the_fewest_measured() -> None:
    assert replace(PACE, seconds_per_call=((4, 2.5),)).seconds(1, SIDE * SIDE) == 2.5


def test_the_points_need_no_order_and_one_is_enough() -> None:
    assert replace(PACE, seconds_per_call=((4, 2.5), (1, 1.0))).seconds(2, SIDE**2) == 1.5
    assert replace(PACE, seconds_per_call=((1, 1.0),)).seconds(3, SIDE**2) == 3.0


def test_in_exact_mode_every_call_costs_as_much_as_a_full_one() -> None:
    padded = replace(PACE, padded=True)
    assert [padded.seconds(rows, SIDE**2) for rows in (1, 2, 4)] == [2.5] * 3


def test_a_smaller_picture_costs_its_area_a_larger_one_more_than_that() -> None:
    assert PACE.seconds(1, SIDE**2 // 4) == pytest.approx(0.25)
    assert 4.0 < PACE.seconds(1, SIDE**2 * 4) == pytest.approx(4.675 / 0.804, rel=0.01)
    assert PACE.decode_seconds(SIDE**2 * 4) == 2.0


def test_one_picture_alone_takes_its_calls_and_its_decoding() -> None:
    assert finish_times([work(10)], PACE) == [pytest.approx(10.5)]
    assert finish_times([work(10, rows=2)], PACE) == [pytest.approx(15.5)]
    assert finish_times([], PACE) == []


def test_pictures_that_fit_into_one_call_share_it() -> None:
    together = finish_times([work(10, rows=2), work(10, rows=2)], PACE)
    assert together == [pytest.approx(25.5), pytest.approx(26.0)]


def test_what_does_not_fit_waits_and_is_not_overtaken() -> None:
    # Three rows run. The guided fourth picture needs two, and the fifth must not overtake it.
    times = finish_times([work(5), work(5), work(5), work(5, rows=2), work(1)], PACE)
    assert times[:3] == [pytest.approx(10.5), pytest.approx(11.0), pytest.approx(11.5)]
    assert times[4] == pytest.approx(11.5 + 2.0 + 0.5)
    assert times[3] == pytest.approx(times[4] + 4 * 1.5 + 0.5)


def test_sizes_take_turns() -> None:
    small, large = work(10), work(10, side=2 * SIDE)
    alone = finish_times([large], PACE)[0]
    times = finish_times([small, large], PACE)
    assert times[0] == pytest.approx(10 * (1.0 + PACE.seconds(1, large.pixels)) + 0.5)
    assert times[1] == pytest.approx(alone + 10.5)


def test_a_request_that_limits_its_share_lets_others_pass() -> None:
    limited = [replace(work(10), batch_size=1)] * 3
    times = finish_times([*limited, work(10, request=2)], PACE)
    assert times[3] < times[1] < times[2]


def test_a_guided_picture_runs_even_where_one_row_is_the_most() -> None:
    assert finish_times([work(2, rows=2)], replace(PACE, rows=1)) == [pytest.approx(3.5)]


WORKS = st.lists(
    st.builds(
        Work,
        request_id=st.integers(1, 3),
        rows=st.sampled_from([1, 2]),
        steps=st.integers(1, 12),
        width=st.sampled_from([SIDE, 2 * SIDE]),
        height=st.just(SIDE),
        batch_size=st.sampled_from([None, 1, 2]),
    ),
    max_size=7,
)


def step_by_step(pictures: Sequence[Work], speed: EngineSpeed) -> list[float]:
    """Compute the same schedule one call at a time."""
    left = [picture.steps for picture in pictures]
    times = [math.inf] * len(pictures)
    running: list[int] = []
    now = 0.0
    while any(left):
        for size in dict.fromkeys(picture.size for picture in pictures):
            for i, picture in enumerate(pictures):
                mine = [j for j in running if pictures[j].size == size]
                if picture.size != size or not left[i] or i in running:
                    continue
                mates = [j for j in mine if pictures[j].request_id == picture.request_id]
                if picture.batch_size is not None and len(mates) >= picture.batch_size:
                    continue
                if mine and sum(pictures[j].rows for j in mine) + picture.rows > speed.rows:
                    break
                running.append(i)
        for size in {pictures[i].size for i in running}:
            rows = sum(pictures[i].rows for i in running if pictures[i].size == size)
            now += speed.seconds(rows, size[0] * size[1])
        for i in list(running):
            left[i] -= 1
            if not left[i]:
                now += speed.decode_seconds(pictures[i].pixels)
                times[i] = now
                running.remove(i)
    return times


@given(WORKS, st.sampled_from([1, 2, 4]))
def test_jumping_from_end_to_end_is_the_same_as_going_step_by_step(
    pictures: list[Work], rows: int
) -> None:
    pictures = [replace(p, request_id=100 * p.width + p.request_id) for p in pictures]
    speed = replace(PACE, rows=rows, seconds_per_decode=0.0)  # decoding may be in any order
    assert finish_times(pictures, speed) == pytest.approx(step_by_step(pictures, speed))


@given(WORKS, st.sampled_from([1, 2, 4]))
def test_nothing_is_done_sooner_than_alone_and_everything_by_the_serial_time(
    pictures: list[Work], rows: int
) -> None:
    speed = replace(PACE, rows=rows)
    times = finish_times(pictures, speed)
    alone = [finish_times([picture], speed)[0] for picture in pictures]
    for time, least in zip(times, alone, strict=True):
        assert least <= time * (1 + 1e-9)
    assert not times or max(times) <= sum(alone) * (1 + 1e-9)


def test_a_call_reports_the_pictures_that_were_in_it() -> None:
    pictures = [work(3), work(5), work(9), work(4, rows=2), work(6, side=2 * SIDE)]

    def steps(calls_made: int) -> list[float]:
        return [picture.steps for picture in after(pictures, PACE, calls_made)]

    assert steps(0) == [3, 5, 9, 4, 6]
    assert steps(2) == [2, 4, 8, 4, 5]  # the two sizes alternate
    assert steps(6) == [0, 2, 6, 4, 3]
    assert steps(8) == [0, 1, 5, 3, 2]  # the guided picture has joined
    assert steps(1000) == [0] * 5


@given(WORKS, st.integers(0, 40), st.sampled_from([1, 2, 4]))
def test_what_was_done_is_not_counted_again(
    pictures: list[Work], calls_made: int, rows: int
) -> None:
    speed = replace(PACE, rows=rows, seconds_per_decode=0.0)
    # With a single size, every call advances the pictures of that size.
    pictures = [replace(p, width=SIDE) for p in pictures]
    now = finish_times(pictures, speed)
    later = finish_times(after(pictures, speed, calls_made), speed)
    for before, since in zip(now, later, strict=True):
        passed = before - since
        assert passed >= -1e-6
        assert passed <= calls_made * PACE.seconds(rows + 1, SIDE**2) + 1e-6


def ahead(count: int, steps: int = 10) -> list[Work]:
    return [work(steps, request=100 + i) for i in range(count)]


def test_what_can_be_done_in_time_is_taken() -> None:
    assert refuse([work(10)], [], PACE, BOUNDS) is None
    assert refuse([work(10)], ahead(3), PACE, BOUNDS) is None


@pytest.mark.parametrize(("new", "taken"), list(itertools.product(range(1, 10), range(9))))
def test_the_queue_takes_its_bound_and_not_one_more(new: int, taken: int) -> None:
    quick = replace(PACE, seconds_per_call=((1, 1e-6),), seconds_per_decode=0.0)
    refusal = refuse([work()] * new, ahead(taken), quick, BOUNDS)
    if new > BOUNDS.max_queue:
        assert refusal is not None
        assert refusal.reason == "never"
        assert "fewer pictures" in refusal.message
    elif new + taken > BOUNDS.max_queue:
        assert refusal is not None
        assert refusal.reason == "queue"
        assert "--max_queue" in refusal.message
    else:
        assert refusal is None


def test_a_full_queue_says_when_enough_pictures_will_have_left() -> None:
    pictures = ahead(8, steps=2)
    first, second = sorted(finish_times(pictures, PACE))[:2]
    for new, expected in ((1, first), (2, second)):
        refusal = refuse([work(1)] * new, pictures, PACE, BOUNDS)
        assert refusal is not None
        assert refusal.retry_after_s == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize("timeout", [1.0, 5.0, 20.0, 60.0, 600.0])
@pytest.mark.parametrize("waiting", range(8))
def test_it_is_taken_if_and_only_if_the_estimate_ends_in_time(timeout: float, waiting: int) -> None:
    bounds = replace(BOUNDS, request_timeout_s=timeout)
    new, others = [work(10, rows=2)], ahead(waiting, 12)
    estimate = SAFETY * finish_times([*others, *new], PACE)[-1]
    alone = SAFETY * finish_times(new, PACE)[0]
    refusal = refuse(new, others, PACE, bounds)
    assert (refusal is None) == (estimate <= timeout)
    if refusal is not None:
        assert refusal.reason == ("never" if alone > timeout else "deadline")


def test_time_that_has_passed_since_it_arrived_counts() -> None:
    assert refuse([work(45)], [], PACE, BOUNDS) is None
    refusal = refuse([work(45)], [], PACE, BOUNDS, waited_s=10.0)
    assert refusal is not None
    assert refusal.reason == "deadline"
    assert refuse([work(45)], [], PACE, BOUNDS, waited_s=1000.0) is not None


def test_a_busy_server_names_its_limit_and_an_honest_time_to_come_back() -> None:
    others = ahead(7, steps=40)
    refusal = refuse([work(40)], others, PACE, BOUNDS)
    assert refusal is not None
    assert refusal.reason == "deadline"
    assert "--request_timeout_s 60" in refusal.message
    # The engine is full until about then.
    told = refusal.retry_after_s
    for seconds, taken in ((1.1 * told, True), (0.9 * told, False)):
        calls_made = math.ceil(seconds / PACE.seconds(4, SIDE**2))
        later = [picture for picture in after(others, PACE, calls_made) if picture.steps]
        assert (refuse([work(40)], later, PACE, BOUNDS) is None) == taken


def test_what_an_idle_server_could_not_do_either_gets_the_largest_request_named() -> None:
    refusal = refuse([work(1000)], [], PACE, BOUNDS)
    assert refusal is not None
    assert refusal.reason == "never"
    assert refusal.retry_after_s is None, "no other time helps"
    for words in ("Even an idle server", "at most 46 steps", "pixels", "--request_timeout_s"):
        assert words in refusal.message
    assert refuse([work(calls(48))], [], PACE, BOUNDS) is None
    assert refuse([work(calls(49))], [], PACE, BOUNDS) is not None


def test_two_calls_a_step_halve_what_fits() -> None:
    bounds = replace(BOUNDS, calls_per_step=2)
    refusal = refuse([work(calls(49, 2))], [], PACE, bounds)
    assert refusal is not None
    assert "at most 23 steps" in refusal.message
    assert refuse([work(calls(24, 2))], [], PACE, bounds) is None


def test_fewer_steps_than_the_model_takes_are_not_advised() -> None:
    bounds = replace(BOUNDS, min_steps=4)
    for seconds, said in ((10.0, "ask for at most 4 steps"), (15.0, "ask for at most")):
        slow = replace(PACE, seconds_per_call=((1, seconds / 1.2),))
        refusal = refuse([work(9)], [], slow, replace(bounds, request_timeout_s=56.0))
        assert refusal is not None
        assert said in refusal.message
        assert (" steps" in refusal.message) == (seconds == 10.0)


def test_an_idle_server_does_not_say_that_it_is_busy() -> None:
    late = refuse([work(calls(48))], [], PACE, BOUNDS, waited_s=30.0)
    assert late is not None
    assert late.message.startswith("This request would be done in")


def test_where_a_single_step_is_too_slow_no_number_of_steps_is_named() -> None:
    slow = replace(PACE, seconds_per_call=((1, 100.0),))
    refusal = refuse([work(10)] * 2, [], slow, BOUNDS)
    assert refusal is not None
    assert "ask for fewer pictures, or at most 8 x 8 pixels" in refusal.message
    assert " 0 steps" not in refusal.message
    slowest = refuse([work(10)], [], replace(slow, seconds_per_decode=1e9), BOUNDS)
    assert slowest is not None
    assert "within 60 s: start the server with a longer" in slowest.message


@settings(max_examples=60)
@given(
    steps=st.integers(1, 999),
    sides=st.tuples(st.integers(1, 512), st.integers(1, 512)),
    count=st.integers(1, 8),
    rows=st.sampled_from([1, 2]),
    seconds=st.floats(1e-4, 100.0),
    timeout=st.floats(1.0, 3600.0),
    bounds=st.builds(
        replace,
        st.just(BOUNDS),
        calls_per_step=st.sampled_from([1, 2]),
        min_steps=st.sampled_from([1, 4]),
    ),
    unit=st.sampled_from([8, 16, 64]),
)
def test_what_a_refusal_says_fits_does_and_no_more(
    steps: int,
    sides: tuple[int, int],
    count: int,
    rows: int,
    seconds: float,
    timeout: float,
    bounds: Bounds,
    unit: int,
) -> None:
    speed = replace(PACE, seconds_per_call=((1, seconds), (4, 1.5 * seconds)))
    bounds = replace(bounds, request_timeout_s=timeout, unit=unit)

    def refusal(steps: int, width: int, height: int, share: float = 1.0) -> Refusal | None:
        made = calls(steps, bounds.calls_per_step)
        picture = replace(work(made, rows=rows), width=width, height=height)
        limit = replace(bounds, request_timeout_s=share * timeout)
        return refuse([picture] * count, [], speed, limit)

    width, height = (unit * side for side in sides)
    found = refusal(steps, width, height)
    if found is None:
        return
    assert found.reason == "never"
    assert found.retry_after_s is None
    if fitting := re.search(r"at most (\d+) steps?,", found.message):
        fewer = int(fitting[1])
        assert bounds.min_steps <= fewer < steps
        assert refusal(fewer, width, height, ADVISED) is None
        assert refusal(fewer + 1, width, height, ADVISED) is not None
    else:
        assert refusal(min(steps, bounds.min_steps), width, height, ADVISED) is not None
    if fitting := re.search(r"at most (\d+) x (\d+) pixels", found.message):
        side = int(fitting[1])
        assert fitting[1] == fitting[2]
        assert side % unit == 0
        assert refusal(steps, side, side, ADVISED) is None
    else:
        assert refusal(steps, unit, unit, ADVISED) is not None


def of_refusals() -> list[Callable[[], float]]:
    return [
        lambda: refuse([work(1)], ahead(8, 1), PACE, BOUNDS).retry_after_s,  # type: ignore[union-attr]
        lambda: refuse([work(49)], ahead(1, 5), PACE, BOUNDS).retry_after_s,  # type: ignore[union-attr]
    ]


@pytest.mark.parametrize("retry", of_refusals())
def test_nobody_is_asked_back_sooner_than_after_a_second(retry: Callable[[], float]) -> None:
    assert retry() >= SHORTEST_RETRY_S


@pytest.mark.parametrize(("each", "batch_size"), [(1, None), (64, None), (64, 1)])
def test_a_long_queue_is_judged_quickly_enough_for_an_event_loop(
    each: int, batch_size: int | None
) -> None:
    import time

    pictures = [
        replace(work(50 + i % 7, rows=2, request=i // each), batch_size=batch_size)
        for i in range(1_000)
    ]
    wide = Bounds(max_queue=10_000, request_timeout_s=86_400.0)
    began = time.thread_time()
    refuse([work(50)], pictures, PACE, wide)
    assert time.thread_time() - began < 0.5  # a safety margin; it takes about 20 ms
