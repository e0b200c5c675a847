"""Denoising several pictures at once, by tables or with diffusers' noise schedulers."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dreambooth.diffusion import model as models
from dreambooth.diffusion import sampling, trajectories
from dreambooth.diffusion.model import DiffusionModel
from dreambooth.diffusion.sampling_request import SamplingRequest
from dreambooth.diffusion.schedules import Schedules
from dreambooth.diffusion.trajectories import Trajectory
from dreambooth.model_folder.component_classes import SCHEDULERS

STEPS = (2, 4, 7, 9)


@pytest.fixture(scope="module")
def loaded(small_model_folder: Path) -> DiffusionModel:
    return models.load(small_model_folder, device=torch.device("cpu"))


def with_scheduler(model: DiffusionModel, name: str, **settings: Any) -> DiffusionModel:
    if name == "LMSDiscreteScheduler":
        pytest.importorskip("scipy", reason="diffusers' LMS noise scheduler needs scipy")
    config = model.scheduler_config | settings
    return dataclasses.replace(model, scheduler_class=name, scheduler_config=config)


def request(seed: int, **options: Any) -> SamplingRequest:
    given: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 5} | options
    return SamplingRequest(seed=seed, **given)


def start(model: DiffusionModel, *wanted: SamplingRequest) -> list[Trajectory]:
    schedules = sampling.schedules_of(model)
    return [sampling.start(model, each, schedules) for each in wanted]


def pred_of(picture: Trajectory, seed: int) -> torch.Tensor:
    """Return a made-up prediction.

    It depends on the picture's seed, position and latents, not on the rest of the group.
    """
    draws = torch.Generator().manual_seed(1000 * seed + picture.position)
    seen = trajectories.model_input([picture])
    return 0.3 * seen + torch.randn(seen.shape, generator=draws)


def move(pictures: Sequence[Trajectory], seeds: Sequence[int]) -> None:
    preds = [pred_of(*each) for each in zip(pictures, seeds, strict=True)]
    trajectories.step(pictures, torch.cat(preds))


def walk(picture: Trajectory, seed: int) -> torch.Tensor:
    while not picture.finished:
        move([picture], [seed])
    return picture.latents


@torch.no_grad()
@pytest.mark.parametrize("size", [8, 24])
@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_no_bit_of_a_picture_depends_on_who_travels_with_it(
    loaded: DiffusionModel, name: str, size: int
) -> None:
    model = with_scheduler(loaded, name)
    wanted = [
        request(seed, num_inference_steps=steps, eta=seed / 4, width=size, height=size)
        for seed, steps in enumerate(STEPS)
    ]
    single = [walk(picture, seed) for seed, picture in enumerate(start(model, *wanted))]
    waiting, running = list(enumerate(start(model, *wanted))), []
    ended: dict[int, torch.Tensor] = {}
    while waiting or running:
        running += [waiting.pop()] if waiting else []
        running.reverse()  # give every picture another place in the group
        move([picture for _, picture in running], [seed for seed, _ in running])
        ended |= {seed: picture.latents for seed, picture in running if picture.finished}
        running = [(seed, picture) for seed, picture in running if not picture.finished]
    for seed, latents in enumerate(single):
        assert latents.dtype == torch.float32
        assert torch.equal(ended[seed], latents)


@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 2])
def test_nor_on_how_threads_cut_large_pictures(loaded: DiffusionModel, threads: int) -> None:
    wanted = [request(seed, width=184, height=200, num_inference_steps=2) for seed in range(3)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        single = [walk(picture, seed) for seed, picture in enumerate(start(loaded, *wanted))]
        together = start(loaded, *wanted)
        while not together[0].finished:
            move(together, range(3))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a.latents, b) for a, b in zip(together, single, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_a_table_leads_where_the_noise_scheduler_leads(loaded: DiffusionModel, name: str) -> None:
    model = with_scheduler(loaded, name)
    (tabled,) = start(model, request(1, num_inference_steps=12, eta=0.5))
    untabled = dataclasses.replace(tabled.schedule, rows=None)
    plain = Trajectory(untabled, tabled.latents, torch.Generator().manual_seed(1))
    plain.generator.set_state(tabled.generator.get_state())
    assert trajectories.can_step_together([tabled])
    assert not trajectories.can_step_together([plain, tabled])
    torch.testing.assert_close(walk(tabled, 1), walk(plain, 1), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_pictures_with_and_without_tables_may_share_a_call(loaded: DiffusionModel) -> None:
    wanted = [request(1), request(2), request(3)]
    expected = [walk(picture, seed) for seed, picture in enumerate(start(loaded, *wanted))]
    first, middle, last = start(loaded, *wanted)
    untabled = dataclasses.replace(middle.schedule, rows=None)
    middle = Trajectory(untabled, middle.latents, middle.generator)
    company = [first, middle, last]
    while not first.finished:
        seen = trajectories.model_input(company)
        assert torch.equal(seen[1:2], middle.latents)
        move(company, range(3))
    assert torch.equal(first.latents, expected[0])
    assert torch.equal(last.latents, expected[2])
    torch.testing.assert_close(middle.latents, expected[1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_picture_that_is_not_finite_stays_alone_with_it(loaded: DiffusionModel) -> None:
    wanted = [request(1, num_inference_steps=6), request(2), request(3, num_inference_steps=3)]
    expected = [walk(picture, seed) for seed, picture in enumerate(start(loaded, *wanted))]
    company = start(loaded, *wanted)
    move(company, range(3))
    broken = torch.full_like(company[1].latents, float("inf"))
    preds = [pred_of(company[0], 0), broken, pred_of(company[2], 2)]
    trajectories.step(company, torch.cat(preds))
    for number in (2, 0):
        while not company[number].finished:
            running = [each for each in company if not each.finished]
            move(running, [company.index(each) for each in running])
    assert not company[1].latents.isfinite().all()
    assert torch.equal(company[0].latents, expected[0])
    assert torch.equal(company[2].latents, expected[2])


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["PNDMScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler"]
)
def test_a_step_that_fails_can_be_taken_again(
    loaded: DiffusionModel, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_scheduler(loaded, name)
    wanted = [request(1), request(2)]
    expected = [walk(picture, seed) for seed, picture in enumerate(start(model, *wanted))]
    company, mul, fails = start(model, *wanted), torch.mul, True

    def no_memory(*args: Any, **options: Any) -> torch.Tensor:
        if fails:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return mul(*args, **options)

    monkeypatch.setattr(torch, "mul", no_memory)
    while not company[0].finished:
        fails = True
        with pytest.raises(torch.OutOfMemoryError):
            move(company, range(2))
        fails = False
        move(company, range(2))
    for picture, latents in zip(company, expected, strict=True):
        assert torch.equal(picture.latents, latents)


@torch.no_grad()
@pytest.mark.parametrize("tabled", [True, False])
@pytest.mark.parametrize("name", ["PNDMScheduler", "UniPCMultistepScheduler", "DDIMScheduler"])
def test_a_callers_autocast_rounds_nothing(loaded: DiffusionModel, name: str, tabled: bool) -> None:
    model = with_scheduler(loaded, name)
    preds = torch.randn(5, 1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    ends = []
    for enabled in (False, True):
        (picture,) = start(model, request(1))
        if not tabled:
            untabled = dataclasses.replace(picture.schedule, rows=None)
            picture = Trajectory(untabled, picture.latents, picture.generator)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            for pred in preds:
                trajectories.model_input([picture])
                trajectories.step([picture], pred)
        assert picture.latents.dtype == torch.float32
        ends.append(picture.latents)
    assert torch.equal(*ends)


@torch.no_grad()
def test_a_finished_picture_holds_its_latents_alone(loaded: DiffusionModel) -> None:
    company = start(loaded, request(1, num_inference_steps=1), request(2), request(3))
    while not company[0].finished:
        move(company, range(3))
    held = company[0].latents.untyped_storage().nbytes()
    assert held == company[0].latents.numel() * 4
    assert company[0].past() == []


@torch.no_grad()
def test_nothing_outlives_the_pictures(loaded: DiffusionModel) -> None:
    company = start(loaded, request(1), request(2))
    move(company, range(2))
    group = company[0].group_of(company)
    held = weakref.ref(group)
    gc.disable()
    try:
        del group, company
        assert held() is None, "no cycle keeps latents on a device until the garbage collector runs"
    finally:
        gc.enable()


def test_timesteps_are_those_of_the_noise_scheduler(loaded: DiffusionModel) -> None:
    for name in ("DDIMScheduler", "EulerDiscreteScheduler"):
        schedules = Schedules(
            lambda name=name: models.sampling_scheduler(with_scheduler(loaded, name))
        )
        company = [
            sampling.start(loaded, request(1, num_inference_steps=steps), schedules)
            for steps in (3, 7)
        ]
        expected = torch.stack([each.schedule.timesteps[0] for each in company])
        got = trajectories.timesteps(company)
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)
