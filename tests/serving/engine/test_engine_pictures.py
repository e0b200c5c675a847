"""The engine draws the pictures that diffusers draws, whatever else shares their U-Net calls."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from dreambooth.diffusion import model as models
from dreambooth.diffusion.model import DiffusionModel
from dreambooth.diffusion.sampling_request import SamplingRequest
from dreambooth.serving.contract.reply import Picture
from dreambooth.serving.engine.drawing_jobs import DrawingJob
from dreambooth.serving.engine.worker import Worker
from dreambooth.tiny import WEIGHTS

CPU = torch.device("cpu")
PROMPTS = ("a photo of a cat", "a dog on the beach", "snow", "")
NOISE_SCHEDULERS = (
    *("DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"),
    *("EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler", "HeunDiscreteScheduler"),
)


@pytest.fixture(scope="module")
def small(small_model_folder: Path) -> DiffusionModel:
    return models.load(small_model_folder, device=CPU)


@pytest.fixture(scope="module")
def embedded() -> DiffusionModel:
    return models.load(WEIGHTS, device=CPU)


def with_scheduler(model: DiffusionModel, name: str) -> DiffusionModel:
    if name == "LMSDiscreteScheduler":
        pytest.importorskip("scipy", reason="diffusers' LMS noise scheduler needs scipy")
    return dataclasses.replace(model, scheduler_class=name)


def worker(model: DiffusionModel, *, batch_rows: int | None = None, max_rows: int = 8) -> Worker:
    return Worker(model, batch_rows=batch_rows, max_rows=max_rows, safety_checker=None)


def request(seed: int, **options: Any) -> SamplingRequest:
    given: dict[str, Any] = {"prompt": PROMPTS[0], "num_inference_steps": 5} | options
    return SamplingRequest(seed=seed, **given)


def alone(worker: Worker, request: SamplingRequest) -> Picture:
    (picture,) = together(worker, [request])
    return picture


def together(worker: Worker, requests: Sequence[SamplingRequest]) -> list[Picture]:
    job = DrawingJob(requests)
    worker.add(job)
    while worker.has_work:
        worker.run_round()
    return job.result(timeout=0)


def traffic(
    worker: Worker, requests: Sequence[SamplingRequest], draw: random.Random
) -> list[Picture]:
    """Submit one to three requests at random moments, in random order; return the pictures."""
    waiting = list(enumerate(requests))
    draw.shuffle(waiting)
    jobs: list[tuple[list[int], DrawingJob]] = []
    while waiting or worker.has_work:
        if waiting and draw.random() < 0.4:
            some = [waiting.pop() for _ in range(min(len(waiting), draw.randint(1, 3)))]
            jobs.append(([number for number, _ in some], DrawingJob([each for _, each in some])))
            worker.add(jobs[-1][1])
        worker.run_round()
    pictures = {}
    for numbers, job in jobs:
        pictures |= dict(zip(numbers, job.result(timeout=0), strict=True))
    return [pictures[number] for number in range(len(requests))]


def mixed(draw: random.Random, count: int, *, sizes: Sequence[int | None] = (None, 24)) -> Any:
    return [
        SamplingRequest(
            prompt=draw.choice(PROMPTS),
            negative_prompt=draw.choice(PROMPTS),
            num_inference_steps=draw.randint(1, 6),
            guidance_scale=draw.choice((1.0, 0.0, 2.5, 7.5, 9.0)),
            width=draw.choice(sizes),
            seed=draw.randrange(2**64),
        )
        for _ in range(count)
    ]


def difference(pictures: Sequence[Picture], others: Sequence[Picture]) -> int:
    largest = 0
    for one, other in zip(pictures, others, strict=True):
        assert (one.seed, one.finish_reason) == (other.seed, "SUCCESS")
        assert one.pixels.std() > 1, "a flat picture proves nothing"
        largest = max(largest, int(np.abs(one.pixels.astype(int) - other.pixels).max()))
    return largest


@pytest.mark.parametrize("batch_rows", [None, 4])
@pytest.mark.parametrize("name", NOISE_SCHEDULERS)
def test_a_picture_alone_is_that_of_the_diffusers_pipeline_within_1_of_255(
    small: DiffusionModel, name: str, batch_rows: int | None
) -> None:
    model = with_scheduler(small, name)
    pipeline = diffusers.StableDiffusionPipeline(
        vae=model.vae,
        text_encoder=model.text_encoder,
        tokenizer=model.tokenizer,
        unet=model.unet,
        scheduler=models.sampling_scheduler(model),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    options = {"prompt": PROMPTS[0], "negative_prompt": "snow", "num_inference_steps": 5}
    images = pipeline(
        **options,
        guidance_scale=5.0,
        generator=torch.Generator("cpu").manual_seed(3),
        output_type="np",
    ).images
    theirs = (images[0] * 255).round().astype(int)
    ours = alone(worker(model, batch_rows=batch_rows), request(3, guidance_scale=5.0, **options))
    assert np.abs(ours.pixels - theirs).max() <= 1


@pytest.mark.parametrize("name", NOISE_SCHEDULERS)
def test_elastic_pictures_in_traffic_are_those_alone_within_2_of_255(
    small: DiffusionModel, name: str
) -> None:
    draw = random.Random(name)
    model = with_scheduler(small, name)
    requests = mixed(draw, 6)
    expected = [alone(worker(model), each) for each in requests]
    assert difference(traffic(worker(model, max_rows=6), requests, draw), expected) <= 2


def test_the_embedded_model_in_traffic(embedded: DiffusionModel) -> None:
    draw = random.Random(1)
    requests = mixed(draw, 5, sizes=[None])
    expected = [alone(worker(embedded), each) for each in requests]
    assert difference(traffic(worker(embedded), requests, draw), expected) <= 2


@pytest.mark.parametrize("batch_rows", [4, 5])
def test_exact_pictures_never_change_a_byte_in_random_traffic(
    small: DiffusionModel, batch_rows: int
) -> None:
    draw = random.Random(batch_rows)
    model = with_scheduler(small, "EulerAncestralDiscreteScheduler")
    requests = mixed(draw, 8)
    engine = worker(model, batch_rows=batch_rows)
    first = traffic(engine, requests, draw)
    again = traffic(engine, requests, draw)
    single = [alone(engine, each) for each in requests]
    assert difference(first, again) == difference(first, single) == 0
    assert all(picture.exact for picture in first)


def test_exact_latents_keep_every_bit_where_threads_make_places_matter(
    embedded: DiffusionModel,
) -> None:
    # The U-Net runs with two threads, which split this model's calls of five rows inside the last
    # row; nothing else needs two. Latents are compared, because rounding to pixels would hide
    # differences.
    model = with_scheduler(embedded, "DDIMScheduler")
    requests = [
        request(seed, num_inference_steps=1, guidance_scale=scale)
        for seed, scale in ((0, 5.0), (1, 5.0), (4, 1.0))
    ]
    before = torch.get_num_threads()
    latents: list[torch.Tensor] = []
    hooks = [
        model.unet.register_forward_pre_hook(lambda *_: torch.set_num_threads(2)),
        model.unet.register_forward_hook(lambda *_: torch.set_num_threads(before)),
        model.vae.post_quant_conv.register_forward_pre_hook(
            lambda _, inputs: latents.append(inputs[0].clone())
        ),
    ]
    try:
        engine = worker(model, batch_rows=5)
        company = together(engine, requests)
        single = [alone(engine, each) for each in requests]
    finally:
        for hook in hooks:
            hook.remove()
    assert all(picture.exact for picture in (*company, *single))
    assert len(latents) == 6
    for one, other in zip(latents[:3], latents[3:], strict=True):
        assert torch.equal(one, other)


def test_every_exact_call_has_the_same_number_of_rows(small: DiffusionModel) -> None:
    calls: list[int] = []
    engine = worker(small, batch_rows=6)
    hook = small.unet.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    try:
        together(engine, [request(1), request(2, guidance_scale=1.0), request(3), request(4)])
    finally:
        hook.remove()
    assert set(calls) == {6}


def test_elastic_calls_have_the_rows_of_the_load_up_to_the_cap(small: DiffusionModel) -> None:
    calls: list[int] = []
    engine = worker(small, max_rows=4)
    hook = small.unet.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    try:
        together(engine, [request(1), request(2, guidance_scale=1.0), request(3)])
    finally:
        hook.remove()
    # One guided and one unguided picture make three rows; the other guided one has to wait.
    assert calls == [3] * 6 + [2] * 6


def test_pictures_of_one_job_share_calls_only_up_to_its_share(small: DiffusionModel) -> None:
    calls: list[int] = []
    engine = worker(small, max_rows=8)
    job = DrawingJob([request(seed, guidance_scale=1.0) for seed in range(4)], most_pictures=2)
    engine.add(job)
    hook = small.unet.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    try:
        while engine.has_work:
            engine.run_round()
    finally:
        hook.remove()
    assert calls == [2] * 12


class CountedTime:
    """A clock that is advanced only by U-Net calls (1 s) and decoder layers (layer_s)."""

    def __init__(self, model: DiffusionModel, *, layer_s: float) -> None:
        self.seconds = 0.0
        self.calls: list[tuple[float, float]] = []  # start and end of each
        decoder = model.vae.decoder
        blocks = [[*block.resnets, *(block.upsamplers or ())] for block in decoder.up_blocks]
        layers = [decoder.conv_in, decoder.mid_block, *itertools.chain(*blocks), decoder.conv_out]
        self.hooks = [each.register_forward_hook(lambda *_: self._pass(layer_s)) for each in layers]
        self.hooks.append(model.unet.register_forward_hook(lambda *_: self._call()))
        self.layers = len(layers)

    def __enter__(self) -> CountedTime:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _pass(self, seconds: float) -> None:
        self.seconds += seconds

    def _call(self) -> None:
        self.calls.append((self.seconds, self.seconds + 1.0))
        self._pass(1.0)


def timed_worker(model: DiffusionModel, time: CountedTime) -> Worker:
    return Worker(
        model, batch_rows=None, max_rows=8, safety_checker=None, clock=lambda: time.seconds
    )


def test_one_picture_is_decoded_per_step_while_others_run(small: DiffusionModel) -> None:
    with CountedTime(small, layer_s=0.0) as time:
        engine = timed_worker(small, time)
        quick = DrawingJob(
            [request(seed, num_inference_steps=2, guidance_scale=1.0) for seed in range(3)]
        )
        slow = DrawingJob([request(9, num_inference_steps=20)])
        engine.add(quick)
        engine.add(slow)
        done: list[int] = []
        while not quick.done:
            before = engine.pictures_total
            engine.run_round()
            done.append(engine.pictures_total - before)
    assert not slow.done
    assert max(done) == 1
    assert done[-3:] == [1, 1, 1]


@pytest.mark.parametrize("layer_s", [0.01, 0.4])
def test_decoding_never_stalls_the_others_longer_than_a_step(
    small: DiffusionModel, layer_s: float
) -> None:
    wanted = [request(seed, num_inference_steps=seed + 1, guidance_scale=1.0) for seed in range(4)]
    slow = request(9, num_inference_steps=60)
    expected = [alone(worker(small), each) for each in [*wanted, slow]]
    with CountedTime(small, layer_s=layer_s) as time:
        engine = timed_worker(small, time)
        pictures = together(engine, [*wanted, slow])
    gaps = [after[0] - before[1] for before, after in itertools.pairwise(time.calls)]
    assert max(gaps) <= 0.5 + layer_s + 1e-9
    # Smaller gaps would delay the decoding for nothing.
    assert max(gaps) >= min(0.5, time.layers * layer_s)
    assert sum(gap > 0 for gap in gaps) >= 4
    assert difference(pictures, expected) <= 2
    assert engine.seconds_per_decode == pytest.approx(time.layers * layer_s)


def test_who_comes_while_a_picture_is_decoded_waits_for_one_layer(small: DiffusionModel) -> None:
    with CountedTime(small, layer_s=0.4) as time:
        engine = timed_worker(small, time)
        engine.add(DrawingJob([request(1, num_inference_steps=1)]))
        while not time.calls or time.seconds < time.calls[-1][1] + 0.5:
            engine.run_round()
        came = time.seconds
        engine.add(DrawingJob([request(2, num_inference_steps=1)]))
        calls = len(time.calls)
        engine.run_round()
    assert engine.undecoded
    assert time.calls[calls][0] == came


def test_a_job_given_up_while_it_is_decoded_leaves_nothing(small: DiffusionModel) -> None:
    with CountedTime(small, layer_s=0.4) as time:
        engine = timed_worker(small, time)
        job, other = DrawingJob([request(1, num_inference_steps=1)]), DrawingJob([request(2)])
        engine.add(job)
        engine.add(other)
        while not engine.undecoded:
            engine.run_round()
        job.cancel()
        engine.job_cancelled = True
        while engine.has_work:
            engine.run_round()
    assert engine.pictures_total == 1
    assert other.done


def test_pictures_that_wait_for_the_vae_keep_new_ones_out(small: DiffusionModel) -> None:
    engine = worker(small, max_rows=4)
    engine.add(DrawingJob([request(9, num_inference_steps=30, guidance_scale=1.0)]))
    ones = DrawingJob([request(i, num_inference_steps=1, guidance_scale=1.0) for i in range(16)])
    engine.add(ones)
    most = 0
    while not ones.done:
        engine.run_round()
        most = max(most, len(engine.undecoded))
    assert most < 8


def test_a_long_schedule_is_read_while_others_run(small: DiffusionModel) -> None:
    engine = worker(small)
    short = DrawingJob([request(1, num_inference_steps=30)])
    engine.add(short)
    engine.run_round()
    engine.add(DrawingJob([request(2, num_inference_steps=400)]))
    for _ in range(5):
        before = engine.calls_total
        engine.run_round()
        assert engine.calls_total == before + 1
    assert engine.batch_queue.running_rows == 4
    assert sum(
        engine.unet_caller.call_rows([row])
        for row in engine.batch_queue.next()[0]
        if row.trajectory
    )


def test_every_noise_scheduler_draws_one_step(small: DiffusionModel) -> None:
    from dreambooth.model_folder.component_classes import SCHEDULERS

    for name in sorted(SCHEDULERS):
        picture = alone(worker(with_scheduler(small, name)), request(1, num_inference_steps=1))
        assert picture.finish_reason == "SUCCESS", name


def test_latents_that_are_not_finite_are_reported(
    make_model_folder: Callable[..., Path],
) -> None:
    model = models.load(make_model_folder(), device=CPU)
    engine = worker(model)
    hook = model.unet.register_forward_hook(
        lambda _, inputs, output: (torch.full_like(output[0], float("nan")),)
    )
    try:
        (picture,) = together(engine, [request(1)])
    finally:
        hook.remove()
    assert picture.finish_reason == "NOT_FINITE"
    assert picture.pixels.shape == (32, 32, 3)
    assert not picture.pixels.any()
    assert alone(engine, request(1)).finish_reason == "SUCCESS"


def test_a_vae_that_yields_no_numbers_is_reported(make_model_folder: Callable[..., Path]) -> None:
    model = models.load(make_model_folder(), device=CPU)
    model.vae.decoder.conv_out.bias.fill_(float("nan"))
    picture = alone(worker(model), request(1))
    assert picture.finish_reason == "NOT_FINITE"
    assert picture.pixels.shape == (32, 32, 3)


def test_a_black_picture_is_reported(make_model_folder: Callable[..., Path]) -> None:
    model = models.load(make_model_folder(), device=CPU)
    model.vae.decoder.conv_out.weight.zero_()
    model.vae.decoder.conv_out.bias.fill_(-5.0)
    picture = alone(worker(model), request(1))
    assert picture.finish_reason == "BLACK"


def test_every_string_is_encoded_once(small: DiffusionModel) -> None:
    calls: list[int] = []
    engine = worker(small)
    hook = small.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    try:
        for _ in range(3):
            together(engine, [request(1), request(2, prompt="snow", negative_prompt="snow")])
    finally:
        hook.remove()
    assert len(calls) == 3
