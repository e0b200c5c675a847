from __future__ import annotations

import threading
from concurrent.futures import CancelledError

import numpy as np
import pytest

from dreambooth.diffusion.sampling_request import SamplingRequest
from dreambooth.errors import ResourceError
from dreambooth.serving.contract.reply import Picture
from dreambooth.serving.engine.drawing_jobs import DrawingJob


def request(seed: int = 0, steps: int = 5) -> SamplingRequest:
    return SamplingRequest(prompt="a cat", seed=seed, num_inference_steps=steps)


def picture(seed: int) -> Picture:
    return Picture(pixels=np.zeros((8, 8, 3), np.uint8), seed=seed, finish_reason="SUCCESS")


def test_pictures_come_in_the_order_of_the_requests() -> None:
    heard: list[int] = []
    job = DrawingJob([request(1), request(2)], on_picture=lambda i, _: heard.append(i))
    first, second = picture(1), picture(2)
    job.deliver(1, second)
    assert not job.done
    job.deliver(0, first)
    assert job.result(timeout=0) == [first, second]
    assert heard == [1, 0]


def test_no_requests_no_wait() -> None:
    assert DrawingJob([]).result(timeout=0) == []


def test_waiting_ends_with_the_timeout() -> None:
    with pytest.raises(TimeoutError):
        DrawingJob([request()]).result(timeout=0.01)


def test_an_error_reaches_whoever_waits() -> None:
    job = DrawingJob([request()])
    job.fail(ResourceError("too large"))
    job.fail(ValueError("too late"))
    with pytest.raises(ResourceError, match="too large"):
        job.result(timeout=0)


def test_a_cancelled_job_gets_no_more_pictures() -> None:
    heard: list[int] = []
    left: list[bool] = []
    job = DrawingJob(
        [request()],
        on_picture=lambda i, _: heard.append(i),
        on_cancel=lambda: left.append(True),
    )
    job.cancel()
    job.cancel()
    job.deliver(0, picture(0))
    job.fail(ValueError())
    assert job.done
    assert heard == []
    assert left
    with pytest.raises(CancelledError):
        job.result(timeout=0)


def test_what_is_done_cannot_be_given_up() -> None:
    job = DrawingJob([request()])
    job.deliver(0, picture(0))
    job.cancel()
    assert len(job.result(timeout=0)) == 1


def test_a_listener_that_fails_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    def fail(index: int, picture: Picture) -> None:
        raise RuntimeError("listener")

    job = DrawingJob([request()], on_picture=fail)
    job.deliver(0, picture(0))
    assert len(job.result(timeout=0)) == 1
    assert "The callback for a finished picture failed." in caplog.text


def test_done_callbacks_are_called_once_from_whatever_thread() -> None:
    heard: list[DrawingJob] = []
    job = DrawingJob([request()])
    job.add_done_callback(heard.append)
    thread = threading.Thread(target=job.deliver, args=(0, picture(0)))
    thread.start()
    thread.join()
    job.add_done_callback(heard.append)
    assert heard == [job, job]
