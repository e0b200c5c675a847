"""The engine with its thread, as users of `submit` see it."""

from __future__ import annotations

import gc
import json
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dreambooth.diffusion import model as models
from dreambooth.diffusion import sampling
from dreambooth.diffusion.model import DiffusionModel
from dreambooth.diffusion.sampling_request import SamplingRequest
from dreambooth.errors import ModelArtifactError, RequestError, UnavailableError, UserError
from dreambooth.serving.contract.reply import Picture
from dreambooth.serving.engine.engine import Engine, open_engine
from dreambooth.settings.serve_options import ServeSettings
from dreambooth.tiny import WEIGHTS

CPU = torch.device("cpu")
PATIENCE_S = 60
SETTINGS = ServeSettings(model="", device="cpu")
quick_engine = partial(Engine, max_rows=4, warm_up_budget_s=0.0)


@pytest.fixture
def model(small_model_folder: Path) -> DiffusionModel:
    return models.load(small_model_folder, device=CPU)


@pytest.fixture
def engine(model: DiffusionModel) -> Iterator[Engine]:
    engine = quick_engine(model)
    engine.start()
    yield engine
    engine.close(drain=False)
    assert not any(thread.name == "engine" for thread in threading.enumerate())


def request(seed: int = 0, **options: Any) -> SamplingRequest:
    given: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 4} | options
    return SamplingRequest(seed=seed, **given)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def test_requests_of_several_threads_get_their_own_pictures(
    engine: Engine, model: DiffusionModel
) -> None:
    results: dict[int, list[Picture]] = {}

    def ask(seed: int) -> None:
        wanted = [request(seed, num_inference_steps=3 + seed % 3), request(seed + 100)]
        results[seed] = engine.submit(wanted).result(PATIENCE_S)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, pictures in results.items():
        assert [picture.seed for picture in pictures] == [seed, seed + 100]
        assert [picture.finish_reason for picture in pictures] == ["SUCCESS"] * 2
        wanted = [request(seed, num_inference_steps=3 + seed % 3), request(seed + 100)]
        for picture, alone in zip(pictures, sampling.generate(model, wanted), strict=True):
            assert alone is not None
            assert np.abs(picture.pixels.astype(int) - alone).max() <= 2
    status = engine.status()
    assert (status.queued_pictures, status.running_rows, status.undecoded) == (0, 0, 0)
    assert status.pictures_total == 12
    assert engine.broken is None


def test_warm_up_draws_and_measures(model: DiffusionModel) -> None:
    engine = Engine(model, max_rows=4)
    warm = engine.start()
    try:
        assert [rows for rows, _ in warm.seconds_per_call] == [1, 2, 4]
        assert warm.rows in (2, 4)
        assert engine.warm_up == warm
        assert warm.seconds_per_decode > 0
        status = engine.status()
        assert (status.pictures_total, status.calls_total) == (0, 0)
        assert dict(status.seconds_per_call).keys() == {1, 2, 4}
    finally:
        engine.close(drain=True)


def test_a_noise_scheduler_that_needs_several_steps_is_started(
    make_model_folder: Callable[..., Path],
) -> None:
    folder = make_model_folder(scheduler_settings={"skip_prk_steps": False})
    with open_engine(folder, SETTINGS, warm_up_budget_s=0.0) as engine:
        (picture,) = engine.submit([request()]).result(PATIENCE_S)
        assert picture.finish_reason == "SUCCESS"
        with pytest.raises(RequestError, match="num_inference_steps must lie between 4 and 999"):
            engine.submit([request(num_inference_steps=3)])


def test_a_model_that_cannot_draw_is_reported_at_the_start(model: DiffusionModel) -> None:
    for parameter in model.unet.conv_out.parameters():
        parameter.fill_(float("nan"))
    engine = quick_engine(model)
    with pytest.raises(ModelArtifactError, match="not finite"):
        engine.start()
    assert engine.broken is not None
    with pytest.raises(UnavailableError):
        engine.submit([request()])
    held = weakref.ref(engine)
    del engine
    gc.collect()
    assert held() is None, "nothing holds a model that cannot be used"


@pytest.mark.parametrize(
    ("file", "setting"),
    [
        ("vae/config.json", {"scaling_factor": "x"}),
        ("scheduler/scheduler_config.json", {"timestep_spacing": "none"}),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1] * 5}),
    ],
)
def test_a_folder_that_says_what_no_network_can_do_is_reported_at_the_start(
    make_model_folder: Callable[..., Path], file: str, setting: dict[str, Any]
) -> None:
    path = make_model_folder() / file
    path.write_text(json.dumps(json.loads(path.read_text()) | setting))
    with pytest.raises(ModelArtifactError, match=f"{file} gives {next(iter(setting))} as"):
        open_engine(path.parents[1], SETTINGS, warm_up_budget_s=0.0)


def test_what_the_model_cannot_draw_is_refused_before_any_work(engine: Engine) -> None:
    with pytest.raises(RequestError, match="width must be"):
        engine.submit([request(), request(width=20)])
    assert engine.status().queued_pictures == 0


def test_no_pictures_are_an_empty_list(engine: Engine) -> None:
    assert engine.submit([]).result(PATIENCE_S) == []


def test_a_job_given_up_frees_its_rows_at_the_next_step(engine: Engine) -> None:
    long = engine.submit([request(seed, num_inference_steps=900) for seed in range(5)])
    until(lambda: engine.status().running_rows > 0)
    assert not long.done
    long.cancel()
    at = engine.status().calls_total
    until(lambda: engine.status().running_rows == 0)
    assert engine.status().calls_total <= at + 2
    assert engine.status().queued_pictures == 0
    with pytest.raises(CancelledError):
        long.result()
    assert len(engine.submit([request()]).result(PATIENCE_S)) == 1


def test_a_job_given_up_before_the_engine_has_it_leaves_nothing(model: DiffusionModel) -> None:
    engine = quick_engine(model)
    job = engine.submit([request()])
    job.cancel()
    engine.start()
    engine.close(drain=True)
    assert engine.status().pictures_total == engine.status().running_rows == 0


def test_a_device_lost_while_a_job_is_taken_in_leaves_nobody_waiting(
    model: DiffusionModel,
) -> None:
    engine = Engine(model, batch_rows=2)
    engine.start()

    def lose_device(*_: object) -> None:
        raise torch.AcceleratorError("the device is lost")

    hook = model.unet.register_forward_pre_hook(lose_device)
    jobs = [engine.submit([request(width=16 + 8 * i)]) for i in range(2)]
    for job in jobs:
        with pytest.raises(UnavailableError, match="down"):
            job.result(PATIENCE_S)
    hook.remove()
    engine.close(drain=True)


def test_short_requests_do_not_wait_for_long_ones(engine: Engine) -> None:
    long = engine.submit([request(num_inference_steps=900)])
    until(lambda: engine.status().running_rows > 0)
    engine.submit([request(1)]).result(PATIENCE_S)
    engine.submit([request(2, width=16, height=16)]).result(PATIENCE_S)
    assert not long.done
    long.cancel()


def test_pictures_are_reported_one_by_one(engine: Engine) -> None:
    heard: list[tuple[int, int]] = []
    wanted = [request(1, num_inference_steps=9), request(2, num_inference_steps=2)]
    job = engine.submit(wanted, on_picture=lambda i, picture: heard.append((i, picture.seed)))
    job.result(PATIENCE_S)
    assert heard == [(1, 2), (0, 1)]


def test_close_finishes_what_was_submitted_when_it_drains(model: DiffusionModel) -> None:
    engine = quick_engine(model)
    engine.start()
    jobs = [engine.submit([request(seed)]) for seed in range(5)]
    engine.close(drain=True)
    assert [len(job.result(timeout=0)) for job in jobs] == [1] * 5
    with pytest.raises(UnavailableError, match="closing"):
        engine.submit([request()])


def test_close_gives_up_what_is_left_when_it_does_not_drain(model: DiffusionModel) -> None:
    engine = quick_engine(model)
    engine.start()
    jobs = [engine.submit([request(seed, num_inference_steps=900)]) for seed in range(5)]
    engine.close(drain=False)
    for job in jobs:
        with pytest.raises(UnavailableError, match="closed"):
            job.result(timeout=0)
    assert engine.status().queued_pictures == engine.status().running_rows == 0
    engine.close(drain=False)


def test_a_thread_that_breaks_is_seen_and_leaves_nobody_waiting(
    engine: Engine, model: DiffusionModel
) -> None:
    def lose_device(*_: object) -> None:
        raise torch.AcceleratorError("the device is lost")

    model.unet.register_forward_pre_hook(lose_device)
    with pytest.raises(UnavailableError, match="down"):
        engine.submit([request()]).result(PATIENCE_S)
    until(lambda: engine.broken is not None)
    assert "the device is lost" in str(engine.broken)
    with pytest.raises(UnavailableError, match="down"):
        engine.submit([request()])
    assert engine.status().queued_pictures == engine.status().running_rows == 0


def test_the_global_random_generator_is_not_touched(model: DiffusionModel) -> None:
    model.scheduler_class = "EulerAncestralDiscreteScheduler"
    before = torch.random.get_rng_state()
    with quick_engine(model) as engine:
        engine.start()
        engine.submit([request(), request(1)]).result(PATIENCE_S)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_reported(small_model_folder: Path) -> None:
    with pytest.raises(UserError, match="no GPU can be used"):
        open_engine(small_model_folder, ServeSettings(model="", device="cuda"))


def test_the_embedded_model_opens_and_draws() -> None:
    with open_engine(WEIGHTS, ServeSettings(model=""), warm_up_budget_s=0.0) as engine:
        (picture,) = engine.submit([request()]).result(PATIENCE_S)
    assert picture.pixels.shape == (64, 64, 3)
    assert picture.pixels.flags["C_CONTIGUOUS"]
    assert picture.finish_reason == "SUCCESS"


def test_a_folder_that_is_no_model_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ModelArtifactError):
        open_engine(tmp_path, SETTINGS)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_rows": 1}, "batch_rows must lie between 2 and 256, not 1"),
        ({"batch_rows": 257}, "batch_rows must lie"),
        ({"max_rows": 0}, "max_rows must lie between 1 and 256, not 0"),
    ],
)
def test_numbers_that_no_call_can_have_are_refused(
    model: DiffusionModel, options: dict[str, int], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        Engine(model, **options)  # type: ignore[arg-type]
