from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from dreambooth.diffusion import model as models
from dreambooth.diffusion import sampling
from dreambooth.diffusion.model import DiffusionModel
from dreambooth.diffusion.sampling import generate
from dreambooth.diffusion.sampling_request import SamplingRequest
from dreambooth.errors import ModelArtifactError, RequestError
from dreambooth.limits import LIMITS

CAT, DOG = "a photo of a cat", "a photo of a dog on the beach"
CPU = torch.device("cpu")

# Measured on 2026-11-22 with torch 2.13.0 and diffusers 0.42.1 on an x86 CPU, over two models
# (epsilon, v-prediction) with three pictures each and 8 steps: the largest difference from
# StableDiffusionPipeline is 1/255 (a few pixels that round the other way; 0 for most), and so is
# the largest difference between batches of 1 and 3. Equal batches make the same U-Net calls; the
# remaining difference from the pipeline comes from encoding one prompt and decoding one picture at
# a time.
NOISE_SCHEDULERS = {
    "DDIM": ("DDIMScheduler", {}),
    "PNDM": ("PNDMScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "DPM-Solver++": ("DPMSolverMultistepScheduler", {}),
    "DPM-Solver++ SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "LMS": ("LMSDiscreteScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "DDPM": ("DDPMScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
}


@pytest.fixture(scope="module")
def loaded(make_model_folder: Callable[..., Path]) -> dict[str, DiffusionModel]:
    return {
        prediction_type: models.load(make_model_folder(prediction_type=prediction_type), device=CPU)
        for prediction_type in ("epsilon", "v_prediction")
    }


@pytest.fixture
def model(loaded: dict[str, DiffusionModel]) -> DiffusionModel:
    return dataclasses.replace(loaded["epsilon"])


@pytest.fixture
def fresh_model(small_model_folder: Path) -> DiffusionModel:
    return models.load(small_model_folder, device=CPU)


def with_scheduler(model: DiffusionModel, name: str) -> DiffusionModel:
    class_name, settings = NOISE_SCHEDULERS[name]
    if name == "LMS":
        pytest.importorskip("scipy", reason="diffusers' LMS noise scheduler needs scipy")
    return dataclasses.replace(
        model, scheduler_class=class_name, scheduler_config=model.scheduler_config | settings
    )


def requests(*seeds: int, **options: Any) -> list[SamplingRequest]:
    given: dict[str, Any] = {
        "prompt": CAT,
        "num_inference_steps": 5,
        "guidance_scale": 5.0,
    } | options
    return [SamplingRequest(seed=seed, **given) for seed in seeds]


def pipeline_pictures(
    model: DiffusionModel, seeds: Sequence[int], **options: Any
) -> list[np.ndarray]:
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
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    count = len(seeds)
    for name in ("prompt", "negative_prompt"):
        options[name] = [options[name]] * count
    pictures = pipeline(generator=generators, output_type="np", **options).images
    return list((pictures * 255).round().astype("uint8"))


def difference(ours: Iterator[np.ndarray | None], theirs: Iterable[np.ndarray | None]) -> int:
    largest = 0
    for mine, other in zip(ours, theirs, strict=True):
        assert mine is not None
        assert other is not None
        assert mine.dtype == np.uint8
        assert mine.std() > 5, "a flat picture proves nothing"
        largest = max(largest, int(np.abs(mine.astype(int) - other.astype(int)).max()))
    return largest


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", NOISE_SCHEDULERS)
def test_pictures_are_those_of_the_diffusers_pipeline_within_1_of_255(
    loaded: dict[str, DiffusionModel], name: str, prediction_type: str
) -> None:
    model = with_scheduler(loaded[prediction_type], name)
    options: dict[str, Any] = {
        "prompt": CAT,
        "negative_prompt": "snow",
        "num_inference_steps": 8,
        "guidance_scale": 5.0,
    }
    theirs = pipeline_pictures(model, (1, 2, 3), **options)
    ours = generate(model, requests(1, 2, 3, **options), batch_size=3)
    assert difference(ours, theirs) <= 1


def test_ddim_with_eta_draws_the_noise_of_the_pipeline(model: DiffusionModel) -> None:
    model = with_scheduler(model, "DDIM")
    options: dict[str, Any] = {"num_inference_steps": 8, "guidance_scale": 3.0, "eta": 0.7}
    options |= {"prompt": CAT, "negative_prompt": ""}
    theirs = pipeline_pictures(model, (4, 5), **options)
    assert difference(generate(model, requests(4, 5, **options)), theirs) <= 1
    plain = generate(model, requests(4, 5, **options | {"eta": 0.0}))
    assert difference(plain, theirs) > 1


def test_other_sizes_are_those_of_the_pipeline(model: DiffusionModel) -> None:
    options: dict[str, Any] = {"width": 48, "height": 24, "num_inference_steps": 4}
    options |= {"prompt": CAT, "negative_prompt": "", "guidance_scale": 7.5}
    (picture,) = generate(model, requests(6, **options))
    assert picture is not None
    assert picture.shape == (24, 48, 3)
    assert difference(iter([picture]), pipeline_pictures(model, (6,), **options)) <= 1


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_without_guidance_a_picture_costs_one_row(model: DiffusionModel, scale: float) -> None:
    options: dict[str, Any] = {"guidance_scale": scale, "num_inference_steps": 4}
    options |= {"prompt": DOG, "negative_prompt": "snow"}
    theirs = pipeline_pictures(model, (7, 8), **options)
    rows: list[int] = []
    hook = model.unet.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    try:
        assert difference(generate(model, requests(7, 8, **options)), theirs) <= 1
    finally:
        hook.remove()
    assert set(rows) == {2}


@pytest.mark.parametrize("name", NOISE_SCHEDULERS)
def test_a_batched_picture_is_the_single_picture_within_2_of_255(
    model: DiffusionModel, name: str
) -> None:
    model = with_scheduler(model, name)
    company = [
        *requests(1, guidance_scale=2.0),
        *requests(2, prompt=DOG, negative_prompt="snow", guidance_scale=9.0),
        *requests(3, guidance_scale=1.0),
        *requests(4),
    ]
    together = list(generate(model, company, batch_size=4))
    assert difference(generate(model, company, batch_size=1), together) <= 2


def test_pictures_come_in_the_order_of_the_requests_whatever_they_share(
    model: DiffusionModel,
) -> None:
    mixed = [
        *requests(1, num_inference_steps=2),
        *requests(2, width=16),
        *requests(3, 4, num_inference_steps=3),
        *requests(5, num_inference_steps=2),
    ]
    alone = [next(generate(model, [request])) for request in mixed]
    assert difference(generate(model, mixed, batch_size=3), alone) <= 2


def test_one_seed_is_one_picture_and_another_seed_another(model: DiffusionModel) -> None:
    first, again, other = generate(model, requests(9, 9, 10), batch_size=1)
    assert first is not None
    assert again is not None
    assert other is not None
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_only_the_picture_whose_latents_are_not_finite_is_none(model: DiffusionModel) -> None:
    hidden = models.encode_text(model, models.tokenize(model, [DOG]))
    text = {"broken": torch.full_like(hidden, float("nan"))}
    company = [*requests(1), *requests(2, prompt="broken"), *requests(3)]
    pictures = list(generate(model, company, batch_size=3, text=text))
    assert [picture is None for picture in pictures] == [False, True, False]


def test_ready_text_makes_the_text_encoder_needless(model: DiffusionModel) -> None:
    text = {
        CAT: models.encode_text(model, models.tokenize(model, [CAT])),
        "": models.encode_text(model, models.tokenize(model, [""]))[0],
    }
    with_encoder = list(generate(model, requests(1)))
    without = dataclasses.replace(model, text_encoder=None, tokenizer=None)
    assert difference(generate(without, requests(1), text=text), with_encoder) == 0
    assert set(text) == {CAT, ""}


def test_each_string_is_encoded_once(model: DiffusionModel) -> None:
    calls: list[int] = []
    hook = model.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    try:
        company = requests(1, 2, 3, num_inference_steps=1) + requests(4, prompt=DOG)
        list(generate(model, company, batch_size=2))
    finally:
        hook.remove()
    assert len(calls) == 3  # CAT, DOG and the empty negative prompt


def test_the_global_random_generator_is_not_touched(model: DiffusionModel) -> None:
    model = with_scheduler(model, "Euler ancestral")
    before = torch.random.get_rng_state()
    list(generate(model, requests(1, 2, eta=0.0)))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_model_in_training_draws_the_same_picture_and_stays_in_training(
    fresh_model: DiffusionModel,
) -> None:
    expected = list(generate(fresh_model, requests(1)))
    unet = fresh_model.unet.train().requires_grad_(True)
    unet.enable_gradient_checkpointing()
    unet.mid_block.eval()
    for part in unet.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.5
    modes = {name: part.training for name, part in unet.named_modules()}
    before = torch.random.get_rng_state()
    assert difference(generate(fresh_model, requests(1)), expected) == 0
    assert {name: part.training for name, part in unet.named_modules()} == modes
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(p.requires_grad and p.grad is None for p in unet.parameters())


def test_a_preview_that_fails_leaves_the_model_as_it_was(fresh_model: DiffusionModel) -> None:
    fresh_model.unet.train()

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(generate(fresh_model, requests(1), on_step=stop))
    assert all(part.training for part in fresh_model.unet.modules())
    assert torch.is_grad_enabled()


def test_gradients_stay_on_for_the_caller_between_two_pictures(model: DiffusionModel) -> None:
    for _ in generate(model, requests(1, 2, num_inference_steps=1), batch_size=1):
        assert torch.is_grad_enabled()


def test_a_preview_inside_autocast_leaves_the_gradients_of_training_whole(
    fresh_model: DiffusionModel,
) -> None:
    unet = fresh_model.unet.train().requires_grad_(True)
    text = models.encode_text(fresh_model, models.tokenize(fresh_model, [CAT]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        list(generate(fresh_model, requests(1, num_inference_steps=1)))
        loss = unet(torch.ones(1, 4, 16, 16), 10, text).sample.square().mean()
    loss.backward()
    assert all(p.grad is not None for p in unet.parameters())


def test_a_bfloat16_model_draws_nearly_the_float32_picture(
    small_model_folder: Path, model: DiffusionModel
) -> None:
    half = models.load(small_model_folder, device=CPU, dtype=torch.bfloat16)
    assert (
        sampling.start(half, requests(1)[0], sampling.schedules_of(half)).latents.dtype
        == torch.float32
    )
    (picture,), (expected,) = generate(half, requests(1)), generate(model, requests(1))
    assert picture is not None
    assert expected is not None
    assert np.abs(picture.astype(int) - expected.astype(int)).mean() < 3


def test_on_step_counts_every_unet_call_of_all_batches(model: DiffusionModel) -> None:
    heard: list[tuple[int, int]] = []
    company = requests(1, 2, 3, num_inference_steps=4)
    list(
        generate(
            model, company, batch_size=2, on_step=lambda done, total: heard.append((done, total))
        )
    )
    # Two batches, for each of which PNDM makes one call more than num_inference_steps.
    assert heard == [(done, 10) for done in range(1, 11)]
    assert sampling.count_steps(model, company, batch_size=2) == 10


def test_a_batch_is_drawn_only_when_its_first_picture_is_asked_for(model: DiffusionModel) -> None:
    steps: list[int] = []
    pictures = generate(
        with_scheduler(model, "DDIM"),
        requests(1, 2, 3, num_inference_steps=2),
        batch_size=2,
        on_step=lambda done, _: steps.append(done),
    )
    assert steps == []
    next(pictures)
    next(pictures)
    assert steps == [1, 2]
    assert len(list(pictures)) == 1
    assert steps == [1, 2, 3, 4]


def test_a_request_that_cannot_be_served_is_refused_before_any_work(model: DiffusionModel) -> None:
    wrong = dataclasses.replace(requests(1)[0], num_inference_steps=1000)
    with pytest.raises(RequestError, match="num_inference_steps must lie between 1 and 999"):
        generate(model, [*requests(1), wrong])


@pytest.mark.parametrize("size", [0, 257])
def test_a_batch_outside_its_cap_is_refused(model: DiffusionModel, size: int) -> None:
    with pytest.raises(RequestError, match=f"batch_size must lie between 1 and 256, not {size}"):
        generate(model, requests(1), batch_size=size)


def test_the_caps_are_those_given(model: DiffusionModel) -> None:
    limits = dataclasses.replace(LIMITS, max_generated_pixels=32 * 24)
    fitting = dataclasses.replace(requests(1)[0], width=32, height=24)
    generate(model, [fitting], limits=limits)
    too_large = dataclasses.replace(fitting, height=32)
    with pytest.raises(RequestError, match="at most 768 pixels, not 32 x 32"):
        generate(model, [too_large], limits=limits)


def test_a_noise_schedule_without_numbers_is_reported(model: DiffusionModel) -> None:
    model = dataclasses.replace(model, scheduler_config={"num_train_timesteps": "many"})
    with pytest.raises(ModelArtifactError, match="whole numbers"):
        generate(model, requests(1))


def test_no_requests_no_pictures(model: DiffusionModel) -> None:
    assert list(generate(model, [])) == []


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("name", NOISE_SCHEDULERS)
def test_the_fewest_steps_work(model: DiffusionModel, name: str, steps: int) -> None:
    model = with_scheduler(model, name)
    request = requests(2**64 - 1, num_inference_steps=steps, width=8, height=8)
    assert next(generate(model, request)) is not None


@pytest.mark.parametrize("name", ["DDIM", "PNDM", "DDPM"])
def test_the_most_steps_fit_the_noise_schedule(model: DiffusionModel, name: str) -> None:
    timesteps = sampling.schedules_of(with_scheduler(model, name)).take(999).timesteps
    assert int(timesteps.min()) >= 0
    assert int(timesteps.max()) < 1000
