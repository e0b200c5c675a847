from __future__ import annotations

from dreambooth.serving.contract.engine_status import EngineStatus
from dreambooth.serving.supervision.messages import Done
from dreambooth.serving.supervision.watchdog import EngineTimeouts, Watchdog

TIMEOUTS = EngineTimeouts(silence_s=10, step_s=100, load_s=1000)


def working(steps: int, **more: int) -> EngineStatus:
    return EngineStatus(running_rows=2, calls_total=steps, **more)


def beat(dog: Watchdog, begin: int, end: int, message: EngineStatus) -> None:
    for now in range(begin, end, 5):
        dog.received(now, message)


def test_silence_is_a_fault_in_every_state() -> None:
    for ready in (False, True):
        dog = Watchdog(TIMEOUTS, 0.0)
        if ready:
            dog.ready(0.0)
        dog.received(5.0, EngineStatus())
        assert dog.overdue(15.0) is None
        assert "no sign of life for 10 s" in (dog.overdue(15.1) or "")
        dog.received(15.1, Done(request_id=1))  # any message counts
        assert dog.overdue(20.0) is None


def test_an_engine_that_was_ready_is_silent_before_it_is_overdue() -> None:
    dog = Watchdog(EngineTimeouts(silence_s=60, quiet_s=10, step_s=100, load_s=1000), 0.0)
    assert not dog.quiet(20.0)  # it is still loading
    dog.ready(20.0)
    dog.received(20.0, EngineStatus())
    assert not dog.quiet(30.0)
    assert dog.quiet(30.1)
    assert dog.overdue(30.1) is None
    dog.received(31.0, EngineStatus())
    assert not dog.quiet(31.0)


def test_loading_may_take_long_but_not_forever() -> None:
    dog = Watchdog(TIMEOUTS, 0.0)
    beat(dog, 0, 1001, EngineStatus())
    assert dog.overdue(1000.0) is None
    assert "not ready within 1000 s" in (dog.overdue(1000.5) or "")


def test_work_without_progress_is_a_fault() -> None:
    dog = Watchdog(TIMEOUTS, 0.0)
    dog.ready(0.0)
    beat(dog, 0, 101, working(7))
    assert dog.overdue(100.0) is None
    assert "no step within 100 s" in (dog.overdue(100.5) or "")
    dog.received(100.6, working(8))
    assert dog.overdue(100.7) is None


def test_the_time_of_loading_is_no_step() -> None:
    dog = Watchdog(TIMEOUTS, 0.0)
    beat(dog, 0, 500, working(0))
    dog.ready(500.0)
    dog.received(501.0, working(0))
    assert dog.overdue(505.0) is None


def test_pictures_that_come_out_and_pictures_that_are_decoded_count() -> None:
    dog = Watchdog(TIMEOUTS, 0.0)
    dog.ready(0.0)
    beat(dog, 0, 96, working(7))
    beat(dog, 96, 150, EngineStatus(undecoded=1, calls_total=7, pictures_total=1))
    assert dog.overdue(150.0) is None
    beat(dog, 150, 201, EngineStatus(undecoded=1, calls_total=7, pictures_total=1))
    assert dog.overdue(200.0) is not None


def test_an_idle_engine_need_not_do_anything() -> None:
    dog = Watchdog(TIMEOUTS, 0.0)
    dog.ready(0.0)
    beat(dog, 0, 5000, EngineStatus(calls_total=3))
    assert dog.overdue(5000.0) is None


def test_large_pictures_get_the_time_that_their_calls_take() -> None:
    dog = Watchdog(TIMEOUTS, 0.0)
    dog.ready(0.0)
    dog.allow(step_s=500.0)
    beat(dog, 0, 501, working(7))
    assert dog.overdue(499.0) is None
    assert dog.overdue(501.0) is not None


def test_once_they_are_done_steps_must_be_as_quick_as_before() -> None:
    dog = Watchdog(TIMEOUTS, 0.0)
    dog.ready(0.0)
    dog.allow(step_s=500.0)
    dog.received(0.0, EngineStatus(calls_total=6))
    dog.allow(step_s=1.0)
    beat(dog, 0, 106, working(7))
    assert dog.overdue(106.0) is not None


def test_time_in_which_nobody_listened_does_not_count() -> None:
    dog = Watchdog(TIMEOUTS, 0.0)
    dog.received(0.0, EngineStatus())
    dog.exclude(60.0)
    assert dog.overdue(70.0) is None
    assert dog.overdue(70.5) is not None
