from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from dreambooth.diffusion import denoising, sampling
from dreambooth.diffusion import model as models
from dreambooth.diffusion.model import DiffusionModel
from dreambooth.diffusion.sampling_request import SamplingRequest
from dreambooth.diffusion.trajectories import Trajectory

SCHEDULERS = [
    "PNDMScheduler",
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "UniPCMultistepScheduler",
]


@pytest.fixture(scope="module")
def loaded(small_model_folder: Path) -> DiffusionModel:
    return models.load(small_model_folder, device=torch.device("cpu"))


def request(seed: int, **options: Any) -> SamplingRequest:
    given: dict[str, Any] = {"prompt": "a photo of a cat", "num_inference_steps": 5} | options
    return SamplingRequest(seed=seed, **given)


def start(model: DiffusionModel, request: SamplingRequest) -> Trajectory:
    return sampling.start(model, request, sampling.schedules_of(model))


@torch.no_grad()
def alone(model: DiffusionModel, request: SamplingRequest) -> torch.Tensor:
    trajectory, rows = start(model, request), sampling.text_rows(model, [request], {})
    while not trajectory.finished:
        denoising.advance(model.unet, [trajectory], rows)
    return trajectory.latents


@torch.no_grad()
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_trajectories_that_join_and_leave_at_any_step_end_as_if_alone(
    loaded: DiffusionModel, scheduler: str
) -> None:
    model = dataclasses.replace(loaded, scheduler_class=scheduler)
    everyone = [
        request(1, num_inference_steps=7, guidance_scale=3.0),
        request(2, prompt="snow", num_inference_steps=4, guidance_scale=1.0),
        request(3, negative_prompt="beach", guidance_scale=8.0),
        request(4, num_inference_steps=2),
    ]
    waiting = list(everyone)
    running: list[tuple[SamplingRequest, Trajectory]] = []
    ended: dict[int, torch.Tensor] = {}
    while len(ended) < 4:
        if waiting:  # one more picture joins at every step
            running.append((waiting[0], start(model, waiting.pop(0))))
        rows = sampling.text_rows(model, [each for each, _ in running], {})
        denoising.advance(model.unet, [trajectory for _, trajectory in running], rows)
        ended |= {each.seed: t.latents for each, t in running if t.finished}
        running = [(each, t) for each, t in running if not t.finished]
    for each in everyone:
        torch.testing.assert_close(ended[each.seed], alone(model, each), atol=1e-3, rtol=0)


def test_guidance_acts_row_by_row() -> None:
    conditional, unconditional = torch.ones(3, 1, 1, 1), torch.zeros(3, 1, 1, 1)
    scales = torch.tensor([1.0, 2.0, 7.5]).reshape(3, 1, 1, 1)
    guided = denoising.guide(conditional, unconditional, scales)
    assert guided.flatten().tolist() == [1.0, 2.0, 7.5]


@torch.no_grad()
def test_predict_leaves_rows_without_guidance_alone(loaded: DiffusionModel) -> None:
    pair = [request(1, guidance_scale=1.0), request(2, guidance_scale=6.0)]
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([700, 20])
    rows = sampling.text_rows(loaded, pair, {})
    assert rows.encoder_hidden_states.shape[0] == 3
    assert rows.guided.tolist() == [1]
    both = denoising.predict(loaded.unet, latents, timesteps, rows)
    for i in range(2):
        text = sampling.text_rows(loaded, pair[i : i + 1], {})
        part = denoising.predict(loaded.unet, latents[i : i + 1], timesteps[i : i + 1], text)
        torch.testing.assert_close(both[i : i + 1], part, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("most_rows", [1, 2, 3])
def test_a_call_in_parts_predicts_the_same(loaded: DiffusionModel, most_rows: int) -> None:
    trio = [request(1, guidance_scale=1.0), request(2), request(3, prompt="snow")]
    trajectories = [start(loaded, each) for each in trio]
    rows = sampling.text_rows(loaded, trio, {})
    whole = denoising.predictions(loaded.unet, trajectories, rows)
    parts = denoising.predictions(loaded.unet, trajectories, rows, most_rows=most_rows)
    assert [each.position for each in trajectories] == [0, 0, 0]
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_rows_may_lie_anywhere_in_a_padded_call(loaded: DiffusionModel) -> None:
    pair = [request(1, guidance_scale=1.0), request(2, guidance_scale=6.0)]
    trajectories = [start(loaded, each) for each in pair]
    rows = sampling.text_rows(loaded, pair, {})
    expected = denoising.predictions(loaded.unet, trajectories, rows)
    places, sources = torch.tensor([4, 1, 2]), torch.tensor([0, 1, 2, 0, 0])
    placed = dataclasses.replace(
        rows,
        encoder_hidden_states=rows.encoder_hidden_states[sources],
        placement=denoising.Placement(places=places, sources=sources),
    )
    got = denoising.predictions(loaded.unet, trajectories, placed)
    for one, other in zip(expected, got, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
