from __future__ import annotations

from typing import Any

import diffusers
import pytest

from dreambooth.diffusion import schedule_reading
from dreambooth.diffusion.schedules import Schedules


def make(name: str, **settings: Any) -> Any:
    return getattr(diffusers, name)(clip_sample=False, **settings)


def test_only_so_many_schedules_are_kept() -> None:
    made: list[int] = []

    def fresh() -> Any:
        made.append(1)
        return make("DDIMScheduler")

    known = Schedules(fresh, most=2)
    first = known.take(3)
    assert known.take(3) is first
    known.take(3, eta=0.5)
    assert known.take(3) is first
    known.take(5)
    assert known.take(3) is not first
    assert len(made) == 4


def test_a_table_may_be_read_a_little_at_a_time() -> None:
    known = Schedules(lambda: make("DDIMScheduler"))
    for _ in range(3):
        assert known.take_known(10) is None
        known.read_on(10, most_steps=4)
    schedule = known.take_known(10)
    assert schedule is not None
    assert known.take(10) is schedule
    assert schedule.rows == schedule_reading.read(make("DDIMScheduler"), 10).rows


def test_what_was_begun_is_read_to_its_end_first() -> None:
    known = Schedules(lambda: make("DDIMScheduler"))
    known.read_on(10, most_steps=4)
    known.read_on(6, most_steps=6)
    assert known.take_known(10) is not None
    assert known.take_known(6) is None
    known.read_on(6, most_steps=6)
    assert known.take_known(6) is not None


def test_a_noise_scheduler_that_fails_is_the_matter_of_who_wants_it() -> None:
    class Fails(diffusers.DDIMScheduler):  # type: ignore[misc]
        def step(self, *args: Any, **options: Any) -> Any:
            if len(self.timesteps) == 10 and int(args[1]) < 500:
                raise ValueError("no step")
            return super().step(*args, **options)

    known = Schedules(lambda: Fails.from_config(make("DDIMScheduler").config))
    known.read_on(10, most_steps=4)
    known.read_on(6)
    with pytest.raises(ValueError, match="no step"):
        known.take(10)
    assert known.take(6).rows is not None


def test_eta_makes_no_second_schedule_where_it_is_not_known() -> None:
    known = Schedules(lambda: diffusers.PNDMScheduler(skip_prk_steps=True))
    assert known.take(3, eta=0.5) is known.take(3)
