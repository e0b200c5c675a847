from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dreambooth.diffusion import model, sampling, sampling_request
from dreambooth.diffusion.sampling_request import SamplingFacts, SamplingRequest
from dreambooth.errors import ModelArtifactError, RequestError
from dreambooth.limits import LIMITS

FACTS = SamplingFacts(resolution=512, unit=8, max_steps=999)
REQUEST = SamplingRequest(prompt="a photo of a cat", seed=1)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"width": 8, "height": 8},
        {"width": 4096, "height": 1024},
        {"width": 2048, "height": 2048},
        {"num_inference_steps": 1},
        {"num_inference_steps": 999},
        {"guidance_scale": 0.0},
        {"guidance_scale": -1e6},
        {"eta": 0.0},
        {"eta": 1.0},
        {"seed": 0},
        {"seed": 2**64 - 1},
    ],
)
def test_what_the_model_can_draw_passes(change: dict[str, Any]) -> None:
    sampling_request.check(FACTS, dataclasses.replace(REQUEST, **change))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"width": 20}, "width must be a multiple of 8 from 8 to 4096, not 20"),
        ({"width": 4104}, "width must be a multiple of 8 from 8 to 4096, not 4104"),
        ({"width": 2048, "height": 2056}, "at most 4194304 pixels, not 2048 x 2056"),
        ({"height": 0}, "height must be"),
        ({"height": -8}, "height must be"),
        ({"num_inference_steps": 0}, "num_inference_steps must lie between 1 and 999, not 0"),
        ({"num_inference_steps": 1000}, "num_inference_steps must lie between 1 and 999, not 1000"),
        ({"guidance_scale": float("nan")}, "guidance_scale must lie between -1000000 and 1000000"),
        ({"guidance_scale": 1e300}, "guidance_scale must lie"),
        ({"guidance_scale": float("-inf")}, "guidance_scale must lie between -1000000 and 1000000"),
        ({"eta": 1.5}, "eta must lie between 0 and 1"),
        ({"eta": float("nan")}, "eta must lie between 0 and 1"),
        ({"seed": -1}, "seed must lie"),
        ({"seed": 2**64}, "seed must lie"),
    ],
)
def test_what_it_cannot_draw_is_refused_in_one_sentence(change: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words) as refused:
        sampling_request.check(FACTS, dataclasses.replace(REQUEST, **change))
    assert refused.value.status == 400


def test_sides_are_multiples_of_the_vaes_cells() -> None:
    coarse = dataclasses.replace(FACTS, unit=16)
    sampling_request.check(coarse, dataclasses.replace(REQUEST, width=48))
    with pytest.raises(RequestError, match="width must be a multiple of 16 from 16 to 4096"):
        sampling_request.check(coarse, dataclasses.replace(REQUEST, width=40))


def test_the_caps_are_those_given() -> None:
    limits = dataclasses.replace(LIMITS, max_generated_side_pixels=512)
    sampling_request.check(FACTS, REQUEST, limits=limits)
    with pytest.raises(RequestError, match="from 8 to 512, not 520"):
        sampling_request.check(FACTS, dataclasses.replace(REQUEST, height=520), limits=limits)


def test_missing_sizes_are_the_models_own() -> None:
    assert sampling_request.picture_size(FACTS, REQUEST) == (512, 512)
    wide = dataclasses.replace(REQUEST, width=768)
    assert sampling_request.picture_size(FACTS, wide) == (768, 512)


@pytest.mark.parametrize(
    ("name", "config", "least", "most"),
    [
        ("DDIMScheduler", {}, 1, 1000),
        ("DDIMScheduler", {"steps_offset": 1}, 1, 999),
        ("DDIMScheduler", {"num_train_timesteps": 50, "steps_offset": 0}, 1, 50),
        ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}, 1, 999),
        ("PNDMScheduler", {"skip_prk_steps": False}, 4, 1000),
        ("PNDMScheduler", {}, 4, 1000),
        ("PNDMScheduler", {"num_train_timesteps": 4}, 4, 4),
    ],
)
def test_the_noise_schedule_bounds_the_steps(
    name: str, config: dict[str, object], least: int, most: int
) -> None:
    facts = sampling_request.facts_from(
        resolution=512, vae_scale_factor=8, scheduler_class=name, scheduler_config=config
    )
    assert (facts.min_steps, facts.max_steps) == (least, most)
    for steps in (least - 1, most + 1):
        request = dataclasses.replace(REQUEST, num_inference_steps=steps)
        with pytest.raises(RequestError, match=f"between {least} and {most}, not {steps}"):
            sampling_request.check(facts, request)
    sampling_request.check(facts, dataclasses.replace(REQUEST, num_inference_steps=least))


@pytest.mark.parametrize(
    "config", [{"num_train_timesteps": "many"}, {"steps_offset": None}, {"steps_offset": True}]
)
def test_a_noise_schedule_without_numbers_is_reported(config: dict[str, object]) -> None:
    with pytest.raises(ModelArtifactError, match="whole numbers"):
        sampling_request.step_range("DDIMScheduler", config)


@pytest.mark.parametrize(("given", "counted"), [(512, 512), (60, 56), (4, 8)])
def test_a_resolution_is_a_multiple_of_the_unit(given: int, counted: int) -> None:
    facts = sampling_request.facts_from(
        resolution=given, vae_scale_factor=8, scheduler_class="PNDMScheduler", scheduler_config={}
    )
    assert facts.resolution == counted


@pytest.mark.parametrize(
    ("name", "timesteps"), [("DDIMScheduler", 10), ("PNDMScheduler", 13), ("PNDMScheduler", 10)]
)
def test_a_noise_schedule_without_a_step_is_reported(name: str, timesteps: int) -> None:
    config = {"num_train_timesteps": timesteps, "steps_offset": 10}
    with pytest.raises(ModelArtifactError, match="leaves no step"):
        sampling_request.step_range(name, config)


def test_facts_of_the_folder_are_those_of_the_loaded_model(
    make_model_folder: Callable[..., Path],
) -> None:
    folder = make_model_folder(scheduler_settings={"num_train_timesteps": 40})
    facts = sampling_request.read_facts(folder)
    assert facts == SamplingFacts(resolution=32, unit=8, max_steps=39)
    assert facts == sampling.sampling_facts(model.load(folder, device=torch.device("cpu")))


def test_a_folder_that_is_no_model_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ModelArtifactError, match=r"model_index\.json"):
        sampling_request.read_facts(tmp_path)


@pytest.mark.parametrize(
    ("name", "calls"),
    [("PNDMScheduler", 1), ("HeunDiscreteScheduler", 2), ("KDPM2DiscreteScheduler", 2)],
)
def test_schedulers_of_second_order_ask_twice_for_a_step(name: str, calls: int) -> None:
    facts = sampling_request.facts_from(
        resolution=64, vae_scale_factor=8, scheduler_class=name, scheduler_config={}
    )
    assert facts.calls_per_step == calls
