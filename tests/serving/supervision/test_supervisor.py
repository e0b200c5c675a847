"""The supervisor with the real engine and the embedded model.

A stand-in replaces the engine only where it must misbehave. The tests with the real engine share
one supervisor until it is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from dreambooth import tiny
from dreambooth.errors import ModelArtifactError, RequestError, UnavailableError, UserError
from dreambooth.serving.contract.reply import Picture
from dreambooth.serving.contract.request import GenerationRequest
from dreambooth.serving.supervision.counters import SupervisorStatus
from dreambooth.serving.supervision.messages import EngineFaultError
from dreambooth.serving.supervision.supervisor import Supervisor
from dreambooth.serving.supervision.watchdog import EngineTimeouts
from dreambooth.settings.serve_options import ServeSettings

LONG_S = 240.0
# Longer than all of these tests; some reduce the time that is left with waited_s.
TIMEOUT_S = 3600.0
QUEUE = 8
Working = asyncio.Task[list[Picture]]
STAND_IN = Path(__file__).parent / "stand_in.py"


def request(prompts: int = 1, **fields: object) -> GenerationRequest:
    settings: dict[str, object] = {
        "form": "json",
        "prompts": ("a cat",) * prompts,
        "negative_prompts": ("",) * prompts,
        "echo": "a cat",
        "width": 32,
        "height": 32,
        "num_inference_steps": 2,
        **fields,
    }
    return GenerationRequest(**settings)  # type: ignore[arg-type]


def long_request(prompts: int = 1) -> GenerationRequest:
    return request(prompts, num_inference_steps=900)


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def supervisors(runner: asyncio.Runner) -> Iterator[list[Supervisor]]:
    supervisors: list[Supervisor] = []
    yield supervisors
    for supervisor in supervisors:
        runner.run(supervisor.close(0.0))


@pytest.fixture
def supervisor(runner: asyncio.Runner, supervisors: list[Supervisor]) -> Supervisor:
    """Return a supervisor that is ready and idle."""
    if not supervisors or supervisors[-1].state == "closing":
        settings = ServeSettings(model="tiny", request_timeout_s=TIMEOUT_S, max_queue=QUEUE)
        supervisors.append(Supervisor(tiny.WEIGHTS, settings))
        starting = runner.run(begun(supervisors[-1]))
        assert supervisors[-1].status().state == "loading"
        with pytest.raises(UnavailableError, match="being loaded"):
            runner.run(supervisors[-1].generate(request(), 1))
        runner.run(in_time(starting))
    runner.run(until(supervisors[-1], lambda status: ready(status) and idle(status)))
    return supervisors[-1]


async def begun(supervisor: Supervisor) -> asyncio.Task[None]:
    starting = asyncio.create_task(supervisor.start())
    await asyncio.sleep(0)
    return starting


async def in_time(task: asyncio.Task[None]) -> None:
    async with asyncio.timeout(LONG_S):
        await task


async def at_work(supervisor: Supervisor, *requests: GenerationRequest) -> list[Working]:
    """Start tasks for these requests; return them once the engine is drawing."""
    tasks = [asyncio.create_task(supervisor.generate(each, i)) for i, each in enumerate(requests)]
    await until(supervisor, lambda status: status.engine.running_rows > 0)
    return tasks


async def until(supervisor: Supervisor, met: Callable[[SupervisorStatus], bool]) -> None:
    async with asyncio.timeout(LONG_S):
        while not met(supervisor.status()):
            await asyncio.sleep(0.02)


def ready(status: SupervisorStatus) -> bool:
    return status.state == "ready"


def idle(status: SupervisorStatus) -> bool:
    gauges = (status.requests_in_flight, status.pictures_in_flight)
    return not any((*gauges, status.engine.queued_pictures, status.engine.running_rows))


def refusals(supervisor: Supervisor) -> dict[str, int]:
    return dict(supervisor.status().refusals)


def losses(supervisor: Supervisor) -> dict[str, int]:
    return dict(supervisor.status().losses)


def test_pictures_come_in_order_with_their_seeds(
    runner: asyncio.Runner, supervisor: Supervisor
) -> None:
    wanted = request(2, num_images_per_prompt=2, width=24, height=40)
    pictures = runner.run(supervisor.generate(wanted, 2**64 - 2))
    assert [picture.seed for picture in pictures] == [2**64 - 2, 2**64 - 1, 0, 1]
    for picture in pictures:
        assert picture.pixels.shape == (40, 24, 3)
        assert picture.finish_reason == "SUCCESS"
    again = runner.run(supervisor.generate(request(width=24, height=40), 2**64 - 1))
    apart = pictures[1].pixels.astype(int) - again[0].pixels.astype(int)
    assert np.abs(apart).max() <= 2
    status = supervisor.status()
    assert supervisor.state == status.state == "ready"
    assert supervisor.facts.resolution == 64
    assert status.reason == ""
    assert status.load_seconds is not None
    assert status.engine.seconds_per_call


def test_the_engines_refusal_reaches_the_one_who_asked(
    runner: asyncio.Runner, supervisor: Supervisor
) -> None:
    before = losses(supervisor)["engine_error"]
    with pytest.raises(RequestError, match="width must be"):
        runner.run(supervisor.generate(request(width=33), 1))
    assert losses(supervisor)["engine_error"] - before == 1


def test_whoever_leaves_frees_the_engine(runner: asyncio.Runner, supervisor: Supervisor) -> None:
    async def leave() -> None:
        tasks = await at_work(supervisor, *[long_request(2)] * 3)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert all(task.cancelled() for task in tasks)
        assert supervisor.status().requests_in_flight == 0
        await until(supervisor, idle)

    before = losses(supervisor)["cancelled"]
    runner.run(leave())
    assert losses(supervisor)["cancelled"] - before == 3


def test_more_than_the_queue_holds_is_refused_before_it_is_sent_to_the_engine(
    runner: asyncio.Runner, supervisor: Supervisor
) -> None:
    async def overload() -> None:
        tasks = await at_work(supervisor, *[long_request(2)] * 4)
        assert supervisor.status().pictures_in_flight == QUEUE
        with pytest.raises(UnavailableError, match="--max_queue") as caught:
            await supervisor.generate(request(), 1)
        assert caught.value.retry_after_s >= 1
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await until(supervisor, idle)

    before = refusals(supervisor)
    with pytest.raises(RequestError, match="fewer pictures"):
        runner.run(supervisor.generate(request(QUEUE + 1), 1))
    runner.run(overload())
    after = refusals(supervisor)
    assert after["queue"] - before["queue"] == after["never"] - before["never"] == 1


def test_what_cannot_be_done_in_time_is_refused_at_once(
    runner: asyncio.Runner, supervisor: Supervisor
) -> None:
    began = time.monotonic()
    with pytest.raises(UnavailableError, match="must be within"):
        runner.run(supervisor.generate(long_request(), 1, waited_s=TIMEOUT_S - 0.01))
    huge = request(num_inference_steps=900, width=2048, height=2048)
    with pytest.raises(RequestError, match="Even an idle server"):
        runner.run(supervisor.generate(huge, 1))
    assert time.monotonic() - began < 30  # only a guard; the pictures would take hours
    assert idle(supervisor.status())


def test_what_is_late_all_the_same_is_given_up(
    runner: asyncio.Runner, supervisor: Supervisor
) -> None:
    async def late() -> None:
        status = supervisor.status()
        assert status.engine_pid is not None
        os.kill(status.engine_pid, signal.SIGSTOP)
        try:
            with pytest.raises(UnavailableError, match="were not done within"):
                await supervisor.generate(request(), 1, waited_s=TIMEOUT_S - 8.0)
        finally:
            os.kill(status.engine_pid, signal.SIGCONT)
        await until(supervisor, idle)

    before = losses(supervisor)["late"]
    runner.run(late())
    assert losses(supervisor)["late"] - before == 1
    assert len(runner.run(supervisor.generate(request(), 1))) == 1


def test_an_engine_that_is_killed_under_load_is_replaced_and_every_request_answered(
    runner: asyncio.Runner, supervisor: Supervisor
) -> None:
    async def kill() -> None:
        tasks = await at_work(supervisor, *[long_request(2)] * 4)
        status = supervisor.status()
        assert status.engine_pid is not None
        os.kill(status.engine_pid, signal.SIGKILL)
        began = time.monotonic()
        errors = await asyncio.gather(*tasks, return_exceptions=True)
        assert time.monotonic() - began < 1.0
        for error in errors:
            assert isinstance(error, UnavailableError)
            assert error.retry_after_s >= 1
        assert supervisor.state in ("down", "loading")
        assert idle(supervisor.status())
        with pytest.raises(UnavailableError):
            await supervisor.generate(request(), 1)
        await until(supervisor, ready)
        assert len(await supervisor.generate(request(), 1)) == 1
        await until(supervisor, idle)

    before = supervisor.status()
    runner.run(kill())
    after = supervisor.status()
    assert after.restarts_total - before.restarts_total == 1
    assert after.engine.calls_total > before.engine.calls_total  # the counters continue
    assert dict(after.losses)["engine_died"] - dict(before.losses)["engine_died"] == 4


def test_close_finishes_what_was_accepted_and_takes_no_more(
    runner: asyncio.Runner, supervisor: Supervisor
) -> None:
    async def close() -> None:
        tasks = await at_work(supervisor, *[request(2, num_inference_steps=20)] * 3)
        closing = asyncio.create_task(supervisor.close(LONG_S))
        again = asyncio.create_task(supervisor.close(LONG_S))
        await asyncio.sleep(0)
        assert supervisor.state == "closing"
        with pytest.raises(UnavailableError, match="shutting down"):
            await supervisor.generate(request(), 1)
        assert [len(pictures) for pictures in await asyncio.gather(*tasks)] == [2, 2, 2]
        await asyncio.gather(closing, again)

    pid = supervisor.status().engine_pid
    assert pid is not None
    runner.run(close())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert supervisor.status().engine_pid is None
    assert refusals(supervisor)["closing"] == 1


def test_a_folder_that_is_no_model_is_reported_and_not_tried_again(
    runner: asyncio.Runner, tmp_path: Path
) -> None:
    supervisor = Supervisor(tmp_path, ServeSettings(model="x"))
    with pytest.raises(ModelArtifactError, match=str(tmp_path)):
        runner.run(supervisor.start())
    status = supervisor.status()
    assert (status.state, status.engine_pid) == ("down", None)
    sentence = "The model cannot be loaded: the server's log says why."
    assert status.reason == sentence  # without the folder, which is no client's business
    with pytest.raises(UnavailableError, match=sentence):
        _ = supervisor.facts
    with pytest.raises(UnavailableError, match=sentence):
        runner.run(supervisor.generate(request(), 1))
    runner.run(supervisor.close())


def test_settings_that_the_engine_refuses_are_reported_and_not_tried_again(
    runner: asyncio.Runner, tmp_path: Path
) -> None:
    async def start() -> None:
        supervisor = misbehaving("refuses_settings", tmp_path)
        with pytest.raises(UserError, match="batch_rows"):
            await supervisor.start()
        await asyncio.sleep(1.0)
        status = supervisor.status()
        assert (status.state, status.restarts_total, status.engine_pid) == ("down", 0, None)
        await supervisor.close()

    runner.run(start())


# Misbehaviour that a real engine does not show.

TIMEOUTS = EngineTimeouts(silence_s=10.0, step_s=2.0, load_s=12.0)


def misbehaving(mode: str, tmp_path: Path, timeouts: EngineTimeouts | None = None) -> Supervisor:
    command = (sys.executable, str(STAND_IN), mode, str(tmp_path / "marker"))
    settings = ServeSettings(model="tiny")
    return Supervisor(tiny.WEIGHTS, settings, timeouts=timeouts or TIMEOUTS, command=command)


@pytest.mark.parametrize(
    "mode", ["hangs_silently", "hangs_in_a_step", "nonsense", "too_few", "wrong_size"]
)
def test_an_engine_that_hangs_or_sends_malformed_messages_is_killed_and_replaced(
    runner: asyncio.Runner, mode: str, tmp_path: Path
) -> None:
    async def live() -> None:
        supervisor = misbehaving(mode, tmp_path)
        await supervisor.start()
        first = supervisor.status().engine_pid
        with pytest.raises(UnavailableError, match="The engine stopped"):
            await supervisor.generate(request(), 1)
        await until(supervisor, ready)
        status = supervisor.status()
        assert status.restarts_total == 1
        assert status.engine_pid != first
        assert (await supervisor.generate(request(), 1))[0].finish_reason == "BLACK"
        await supervisor.close()

    runner.run(live())


def test_an_engine_that_is_frozen_is_down_until_it_resumes(
    runner: asyncio.Runner, tmp_path: Path
) -> None:
    async def live() -> None:
        (tmp_path / "marker").touch()  # the marker makes it behave
        supervisor = misbehaving("nonsense", tmp_path, EngineTimeouts(quiet_s=0.5))
        await supervisor.start()
        pid = supervisor.status().engine_pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        await until(supervisor, lambda status: status.state == "down")
        assert "no sign of life" in supervisor.status().reason
        with pytest.raises(UnavailableError, match="no sign of life"):
            await supervisor.generate(request(), 1)
        os.kill(pid, signal.SIGCONT)
        await until(supervisor, ready)
        assert (await supervisor.generate(request(), 1))[0].finish_reason == "BLACK"
        assert supervisor.status().engine_pid == pid
        await supervisor.close()

    runner.run(live())


def test_an_engine_that_stops_in_the_middle_of_a_picture_delays_nobody_else(
    runner: asyncio.Runner, tmp_path: Path
) -> None:
    async def live() -> None:
        supervisor = misbehaving("stops_in_a_frame", tmp_path, EngineTimeouts(quiet_s=1.0))
        await supervisor.start()
        pid = supervisor.status().engine_pid
        assert pid is not None
        asking = asyncio.create_task(supervisor.generate(request(width=256, height=256), 1))
        turns_s = []
        while supervisor.status().state == "ready":  # as /ping asks
            began = time.monotonic()
            await asyncio.sleep(0.001)
            turns_s.append(time.monotonic() - began)
        assert "no sign of life" in supervisor.status().reason
        assert sorted(turns_s)[len(turns_s) // 2] < 0.05
        assert not asking.done()
        os.kill(pid, signal.SIGCONT)
        async with asyncio.timeout(LONG_S):
            (picture,) = await asking
        assert picture.pixels.shape == (256, 256, 3)
        assert supervisor.status().engine_pid == pid
        await supervisor.close()

    runner.run(live())


def test_an_engine_that_was_ready_is_replaced_at_once_however_often_it_dies(
    runner: asyncio.Runner, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def replaced(times: int) -> Callable[[SupervisorStatus], bool]:
        return lambda status: ready(status) and status.restarts_total == times

    async def live() -> None:
        (tmp_path / "marker").touch()  # the marker makes it behave
        supervisor = misbehaving("nonsense", tmp_path)
        await supervisor.start()
        for deaths in range(1, 5):
            pid = supervisor.status().engine_pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            await until(supervisor, replaced(deaths))
        await supervisor.close()

    runner.run(live())
    pauses = [line for line in caplog.text.splitlines() if "the next starts in" in line]
    assert len(pauses) == 4
    assert all("starts in 0 s" in line for line in pauses)


def test_an_engine_that_never_gets_ready_is_replaced(
    runner: asyncio.Runner, tmp_path: Path
) -> None:
    async def live() -> None:
        supervisor = misbehaving("never_ready", tmp_path)
        async with asyncio.timeout(LONG_S):
            await supervisor.start()
        assert supervisor.status().restarts_total == 1
        await supervisor.close()

    runner.run(live())


def test_a_fault_of_ours_in_loading_is_tried_three_times_and_then_told(
    runner: asyncio.Runner, tmp_path: Path
) -> None:
    async def live() -> None:
        supervisor = misbehaving("cannot_load", tmp_path)
        with pytest.raises(EngineFaultError, match=r"in 3 tries \(OverflowError\)"):
            async with asyncio.timeout(LONG_S):
                await supervisor.start()
        await asyncio.sleep(0.5)
        status = supervisor.status()
        assert (status.state, status.restarts_total, status.engine_pid) == ("down", 2, None)
        await supervisor.close()

    runner.run(live())


def test_an_engine_that_dies_in_loading_without_a_word_is_given_up_in_the_end(
    runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dreambooth.serving.supervision.restart_policy._LONGEST_BACKOFF_S", 0.1)

    async def live() -> None:
        command = (sys.executable, "-c", "import os; os.abort()")
        supervisor = Supervisor(tiny.WEIGHTS, ServeSettings(model="tiny"), command=command)
        with pytest.raises(EngineFaultError, match="ended 8 times before it was ready"):
            async with asyncio.timeout(LONG_S):
                await supervisor.start()
        with pytest.raises(EngineFaultError, match="ended 8 times"):
            await supervisor.wait_until_given_up()
        assert supervisor.status().restarts_total == 7
        await supervisor.close()

    runner.run(live())


def test_a_model_that_cannot_be_loaded_any_more_is_given_up(
    runner: asyncio.Runner, tmp_path: Path
) -> None:
    async def live() -> None:
        supervisor = misbehaving("cannot_load_again", tmp_path)
        await supervisor.start()
        giving_up = asyncio.create_task(supervisor.wait_until_given_up())
        pid = supervisor.status().engine_pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ModelArtifactError, match="the model is gone"):
            async with asyncio.timeout(LONG_S):
                await giving_up
        assert supervisor.state == "down"
        await supervisor.close()

    runner.run(live())


def test_a_hanging_engine_does_not_hold_up_the_end(runner: asyncio.Runner, tmp_path: Path) -> None:
    async def live() -> None:
        supervisor = misbehaving("hangs_in_a_step", tmp_path)
        await supervisor.start()
        task = asyncio.create_task(supervisor.generate(request(), 1))
        await asyncio.sleep(0.1)
        await supervisor.close(0.2)
        with pytest.raises(UnavailableError, match="stopped"):
            await task
        assert supervisor.status().engine_pid is None

    runner.run(live())


def test_an_engine_that_cannot_live_is_not_started_in_a_hot_loop(runner: asyncio.Runner) -> None:
    async def live() -> None:
        settings = ServeSettings(model="tiny")
        supervisor = Supervisor(tiny.WEIGHTS, settings, command=(sys.executable, "-c", "1/0"))
        starting = asyncio.create_task(supervisor.start())
        await until(supervisor, lambda status: status.restarts_total >= 2)
        await asyncio.sleep(1.0)
        status = supervisor.status()
        assert status.restarts_total <= 5  # restarts wait 0, 0.25, 0.5, 1 s
        assert status.state in ("down", "loading")
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await starting
        await supervisor.close()

    runner.run(live())


def test_a_system_that_starts_no_process_is_asked_again_later(runner: asyncio.Runner) -> None:
    async def live() -> None:
        settings = ServeSettings(model="tiny")
        supervisor = Supervisor(tiny.WEIGHTS, settings, command=("/nonexistent/python",))
        starting = asyncio.create_task(supervisor.start())
        await until(supervisor, lambda status: status.restarts_total >= 1)
        assert not starting.done()
        await supervisor.close()
        await starting

    runner.run(live())
