from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from dreambooth.serving.engine.batch_queue import BatchQueue


@dataclass(eq=False)
class Job:
    most_pictures: int | None = None


@dataclass(eq=False)
class Row:
    size: str
    unet_rows: int = 2
    places: tuple[int, ...] | None = None
    job: Job = field(default_factory=Job)


def filled(*rows: Row, most_rows: int = 4) -> BatchQueue[Row]:
    batch_queue: BatchQueue[Row] = BatchQueue(lambda _: most_rows)
    for row in rows:
        batch_queue.add(row)
    return batch_queue


def test_nothing_to_do() -> None:
    batch_queue = filled()
    assert batch_queue.next() == ([], [])
    assert not batch_queue.busy


def test_pictures_join_in_order_as_rows_get_free() -> None:
    rows = [Row("a") for _ in range(4)]
    batch_queue = filled(*rows)
    assert batch_queue.next() == (rows[:2], rows[:2])
    assert batch_queue.next() == (rows[:2], [])
    assert (batch_queue.waiting_count, batch_queue.running_rows) == (2, 4)
    batch_queue.leave(rows[0])
    assert batch_queue.next() == ([rows[1], rows[2]], [rows[2]])


def test_a_picture_that_needs_more_rows_than_are_free_is_not_overtaken() -> None:
    one, pair, another = Row("a", 1), Row("a", 2), Row("a", 1)
    batch_queue = filled(one, pair, another, most_rows=2)
    assert batch_queue.next()[1] == [one]
    assert batch_queue.next()[1] == []
    batch_queue.leave(one)
    assert batch_queue.next()[1] == [pair]


def test_a_picture_larger_than_a_call_runs_alone() -> None:
    rows = [Row("a", 2), Row("a", 2)]
    batch_queue = filled(*rows, most_rows=1)
    assert batch_queue.next()[1] == rows[:1]
    batch_queue.leave(rows[0])
    assert batch_queue.next()[1] == rows[1:]


def test_nobody_joins_without_admission() -> None:
    batch_queue = filled(Row("a"))
    assert batch_queue.next(admit=False) == ([], [])
    assert batch_queue.waiting_count == 1
    assert len(batch_queue.next()[1]) == 1


def test_a_job_with_its_share_lets_others_pass_and_keeps_its_place() -> None:
    job = Job(most_pictures=1)
    first, second, other = Row("a", job=job), Row("a", job=job), Row("a")
    batch_queue = filled(first, second, other)
    assert batch_queue.next()[1] == [first, other]
    last = Row("a")
    batch_queue.add(last)
    batch_queue.leave(first)
    assert batch_queue.next()[1] == [second]


def test_sizes_take_turns_call_by_call() -> None:
    batch_queue = filled(Row("a"), Row("b"), Row("c"))
    assert [batch_queue.next()[0][0].size for _ in range(6)] == list("abcabc")


@pytest.mark.parametrize("seed", range(20))
def test_between_two_calls_of_a_size_every_other_has_at_most_one(seed: int) -> None:
    """This holds whatever rows are added and removed in between, even rows of new sizes."""
    draw = random.Random(seed)
    batch_queue = filled(Row("patient"))
    since: list[str] = []
    for number in range(300):
        for _ in range(draw.randrange(3)):
            batch_queue.add(Row(draw.choice("abc") if draw.random() < 0.5 else f"new {number}"))
        rows, _ = batch_queue.next()
        if rows[0].size == "patient":
            assert len(since) == len(set(since))
            since = []
        else:
            since.append(rows[0].size)
            if draw.random() < 0.5:
                batch_queue.leave(rows[0])


def test_a_size_without_work_is_forgotten() -> None:
    row = Row("a")
    batch_queue = filled(row)
    batch_queue.next()
    batch_queue.leave(row)
    assert batch_queue.next() == ([], [])
    assert (batch_queue.waiting_count, batch_queue.running_rows, batch_queue.busy) == (0, 0, False)


def test_unwanted_pictures_leave_wherever_they_are() -> None:
    job = Job()
    mine = [Row("a", job=job), Row("a", job=job), Row("b", job=job)]
    other = Row("a")
    batch_queue = filled(*mine, other, most_rows=2)
    batch_queue.next()
    batch_queue.drop(lambda row: row.job is job)
    assert batch_queue.waiting_count == 1
    assert batch_queue.next() == ([other], [other])


def test_places_are_never_shared() -> None:
    left, again, right = Row("a", places=(0, 2)), Row("a", places=(0, 2)), Row("a", places=(1, 3))
    batch_queue = filled(left, again, right)
    assert batch_queue.next()[1] == [left, right]
    batch_queue.leave(right)
    assert batch_queue.next()[1] == []
    batch_queue.leave(left)
    assert batch_queue.next()[1] == [again]


def test_who_waits_for_a_place_is_not_kept_from_it_by_later_ones() -> None:
    single = Row("a", 1, places=(0,))
    pair = Row("a", places=(0, 2))
    later = Row("a", 1, places=(2,))
    batch_queue = filled(single, pair, later)
    assert batch_queue.next()[1] == [single]
    batch_queue.leave(single)
    assert batch_queue.next()[1] == [pair]
