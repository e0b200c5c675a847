"""The real engine process with the embedded model; tests share one as long as it lives."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dreambooth import tiny
from dreambooth.diffusion.sampling_request import SamplingRequest
from dreambooth.serving.contract.engine_status import EngineStatus
from dreambooth.serving.supervision import engine_process
from dreambooth.serving.supervision.engine_process import COMMAND, EngineProcess
from dreambooth.serving.supervision.messages import (
    Cancel,
    Close,
    Done,
    Drawn,
    Failed,
    FromEngine,
    Generate,
    LoadFailed,
    Ready,
)
from dreambooth.settings.serve_options import ServeSettings

LONG_S = 240.0
TINY = tiny.WEIGHTS


def command(folder: Path, **settings: bool) -> list[str]:
    chosen = ServeSettings(model="x", **settings)  # type: ignore[arg-type]
    return [*COMMAND, *engine_process.arguments(folder, chosen)]


class Talk:
    """An engine process and the messages that it sent; `until` reads on to a certain message."""

    def __init__(self, runner: asyncio.Runner, process: EngineProcess) -> None:
        self.process = process
        self.loading: list[FromEngine] = []  # messages before and with Ready
        self._runner = runner

    def say(self, *messages: Generate | Cancel | Close) -> None:
        async def send() -> None:
            for message in messages:
                await self.process.send(message)

        self._runner.run(send())

    def until(self, wanted: Callable[[FromEngine], bool]) -> list[FromEngine]:
        async def read() -> list[FromEngine]:
            heard: list[FromEngine] = []
            async with asyncio.timeout(LONG_S):
                while not heard or not wanted(heard[-1]):
                    message = await self.process.receive()
                    assert message is not None, f"it ended: {self.process.exit_reason}"
                    heard.append(message)
            return heard

        return self._runner.run(read())


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def talks(runner: asyncio.Runner) -> Iterator[list[Talk]]:
    talks: list[Talk] = []
    yield talks
    for talk in talks:
        runner.run(talk.process.end())


@pytest.fixture
def talk(runner: asyncio.Runner, talks: list[Talk]) -> Talk:
    """Return the messages of an engine process that is ready and idle.

    It was given the options for speed; graphs are left out without a GPU.
    """
    if not talks or talks[-1].process.exited:
        fast = command(TINY, cuda_graphs=True, channels_last=True)
        talks.append(Talk(runner, runner.run(EngineProcess.spawn(fast))))
        talks[-1].loading = talks[-1].until(lambda message: isinstance(message, Ready))
    talks[-1].until(idle)
    return talks[-1]


def generate(request_id: int, count: int, **fields: object) -> Generate:
    settings: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 3, **fields}
    pictures = tuple(SamplingRequest(seed=i, **settings) for i in range(count))
    return Generate(request_id=request_id, pictures=pictures, batch_size=None)


def idle(message: FromEngine) -> bool:
    return isinstance(message, EngineStatus) and not (
        message.running_rows or message.queued_pictures or message.undecoded
    )


def test_it_gives_signs_of_life_while_it_loads_then_says_how_fast_it_is(talk: Talk) -> None:
    *before, ready = talk.loading
    assert any(isinstance(message, EngineStatus) and message.rss_bytes > 0 for message in before)
    assert isinstance(ready, Ready)
    rows = [rows for rows, _ in ready.seconds_per_call]
    assert rows[0] == 1
    assert rows == sorted(rows)
    assert all(seconds > 0 for _, seconds in ready.seconds_per_call)
    assert ready.seconds_per_decode > 0
    assert ready.rows >= 2


def test_pictures_come_one_by_one_and_then_it_is_done(talk: Talk) -> None:
    before = talk.until(idle)[-1]
    assert isinstance(before, EngineStatus)
    talk.say(generate(7, 3, width=32, height=40))
    heard = talk.until(lambda message: isinstance(message, Done))
    assert heard[-1] == Done(request_id=7)
    drawn = [message for message in heard if isinstance(message, Drawn)]
    assert sorted(message.index for message in drawn) == [0, 1, 2]
    for message in drawn:
        assert (message.request_id, message.picture.seed) == (7, message.index)
        assert message.picture.pixels.shape == (40, 32, 3)
        assert message.picture.finish_reason == "SUCCESS"
        assert message.picture.pixels.any()
    status = talk.until(idle)[-1]
    assert isinstance(status, EngineStatus)
    assert status.pictures_total - before.pictures_total == 3
    assert status.calls_total - before.calls_total >= 3


def test_what_the_model_cannot_draw_is_refused_in_its_words(talk: Talk) -> None:
    talk.say(generate(8, 1, width=33))
    failed = talk.until(lambda message: isinstance(message, Failed))[-1]
    assert isinstance(failed, Failed)
    assert (failed.request_id, failed.fault.error, failed.fault.status) == (8, "RequestError", 400)
    assert "width" in failed.fault.message


def test_a_cancelled_request_stops_and_sends_no_more(talk: Talk) -> None:
    talk.say(generate(9, 4, num_inference_steps=900))
    talk.until(lambda message: isinstance(message, EngineStatus) and message.running_rows > 0)
    talk.say(Cancel(request_id=9), Cancel(request_id=9), Cancel(request_id=12345))
    heard = talk.until(idle)
    assert not any(isinstance(message, Drawn | Done | Failed) for message in heard)


def test_signals_that_a_platform_sends_to_all_do_not_stop_it(talk: Talk) -> None:
    talk.say(generate(10, 1))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(talk.process.pid, number)
    assert talk.until(lambda message: isinstance(message, Done))[-1] == Done(request_id=10)


def test_close_ends_it_with_0(talk: Talk, runner: asyncio.Runner) -> None:
    talk.say(generate(11, 1, num_inference_steps=900), Close())
    assert runner.run(talk.process.wait(LONG_S))
    assert talk.process.exit_reason == "exit code 0"


def test_a_model_that_cannot_be_loaded_is_reported_before_it_ends(
    runner: asyncio.Runner, tmp_path: Path
) -> None:
    process = runner.run(EngineProcess.spawn(command(tmp_path)))
    failed = Talk(runner, process).until(lambda message: isinstance(message, LoadFailed))[-1]
    assert isinstance(failed, LoadFailed)
    assert failed.fault.error == "ModelArtifactError"
    assert str(tmp_path) in failed.fault.message
    assert runner.run(process.wait(LONG_S))
    assert process.exit_reason == "exit code 1"
    runner.run(process.end())


def test_it_ends_when_its_socket_is_closed_even_while_it_loads(runner: asyncio.Runner) -> None:
    process = runner.run(EngineProcess.spawn(command(TINY)))
    Talk(runner, process).until(lambda message: isinstance(message, EngineStatus))
    process.disconnect()
    assert runner.run(process.wait(LONG_S))
    assert process.exit_reason == "exit code 1"
    runner.run(process.end())


PARENT = """
import asyncio, sys
from dreambooth.serving.supervision.engine_process import EngineProcess

async def main():
    process = await EngineProcess.spawn(sys.argv[1:])
    await process.receive()
    print(process.pid, flush=True)
    await asyncio.sleep(1000)

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_it_does_not_outlive_a_parent_that_is_killed() -> None:
    root = Path(tiny.__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, *command(TINY)], stdout=subprocess.PIPE, text=True, cwd=root
    ) as parent:
        assert parent.stdout is not None
        child = Path("/proc") / parent.stdout.readline().strip()
        assert (child / "stat").exists()
        parent.kill()
    deadline = time.monotonic() + LONG_S
    while child.exists() and " Z " not in (child / "stat").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
