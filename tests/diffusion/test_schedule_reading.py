from __future__ import annotations

import json
from typing import Any

import diffusers
import pytest
import torch

from dreambooth.diffusion import schedule_reading
from dreambooth.diffusion.step_tables import DEPTH, Schedule
from dreambooth.model_folder.component_classes import SCHEDULERS
from dreambooth.tiny import WEIGHTS

CONFIG = json.loads((WEIGHTS / "scheduler" / "scheduler_config.json").read_text())
# Rounding error of a float32 expression whose terms may be ten times as large as its result.
ROUNDING = {"atol": 2e-4, "rtol": 1e-4}


def make(name: str, **settings: Any) -> Any:
    if name == "LMSDiscreteScheduler":
        pytest.importorskip("scipy", reason="diffusers' LMS noise scheduler needs scipy")
    config = {key: value for key, value in CONFIG.items() if not key.startswith("_")}
    return getattr(diffusers, name).from_config(config | settings)


def explain(schedule: Schedule, sizes: float = 1.0) -> None:
    """Assert that a table gives what diffusers' noise scheduler makes of random numbers."""
    assert schedule.rows is not None
    noise_scheduler = schedule.noise_scheduler()
    generator = torch.Generator().manual_seed(3)
    again = torch.Generator().manual_seed(3)
    draws = torch.Generator().manual_seed(4)
    latents = torch.randn(1, 4, 5, 3, generator=draws) * noise_scheduler.init_noise_sigma * sizes
    past: list[torch.Tensor] = []
    for position, row in enumerate(schedule.rows):
        pred = torch.randn(latents.shape, generator=draws) * sizes
        timestep = schedule.timesteps[position]
        scaled = noise_scheduler.scale_model_input(latents, timestep)
        torch.testing.assert_close(row.input_scale * latents, scaled)
        options = schedule.step_options(generator)
        expected = noise_scheduler.step(pred, timestep, latents, **options, return_dict=False)[0]
        past = [latents, pred, *past][: 2 * DEPTH]
        got = torch.zeros_like(latents, dtype=torch.float64)
        for weight, each in zip(row.weights, past, strict=False):
            got += weight * each.double()
        assert not any(row.weights[len(past) :])
        assert [bool(row.used >> k & 1) for k in range(2 * DEPTH)] == [w != 0 for w in row.weights]
        if row.noise is not None:
            got += row.noise * torch.randn(latents.shape, generator=again)
        torch.testing.assert_close(got.float(), expected, **ROUNDING)
        latents = expected
    assert torch.equal(generator.get_state(), again.get_state())
    if not schedule.takes_generator:
        assert all(row.noise is None for row in schedule.rows)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_every_noise_scheduler_that_can_be_served_has_a_table_that_explains_it(
    name: str, prediction_type: str
) -> None:
    for steps in (1, 2, 12):
        explain(schedule_reading.read(make(name, prediction_type=prediction_type), steps))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("DPMSolverMultistepScheduler", {"solver_order": 3}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "euler_at_final": True}),
        ("DPMSolverSinglestepScheduler", {"solver_order": 3}),
        ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("UniPCMultistepScheduler", {"solver_order": 3}),
        ("UniPCMultistepScheduler", {"disable_corrector": [0, 1]}),
        ("DDIMScheduler", {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}),
        ("DEISMultistepScheduler", {"solver_order": 3}),
    ],
)
def test_settings_of_a_folder_are_in_the_table(name: str, settings: dict[str, Any]) -> None:
    explain(schedule_reading.read(make(name, prediction_type="v_prediction", **settings), 12))


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_eta_is_in_the_table(eta: float) -> None:
    schedule = schedule_reading.read(make("DDIMScheduler"), 6, eta=eta)
    explain(schedule)
    assert schedule.rows is not None
    assert all((row.noise is None) == (eta == 0.0) for row in schedule.rows)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("DDIMScheduler", {"clip_sample": True}),
        ("DDIMScheduler", {"clip_sample": True, "clip_sample_range": 50.0}),
        ("DDPMScheduler", {"clip_sample": True}),
        ("DDIMScheduler", {"thresholding": True}),
        ("DPMSolverMultistepScheduler", {"thresholding": True}),
        ("HeunDiscreteScheduler", {"clip_sample": True}),
        ("PNDMScheduler", {"skip_prk_steps": False}),  # it needs more than DEPTH past steps
    ],
)
def test_what_is_not_linear_or_remembers_more_has_no_table(
    name: str, settings: dict[str, Any]
) -> None:
    schedule = schedule_reading.read(make(name, **settings), 20)
    assert schedule.rows is None
    assert len(schedule.timestep_values) == len(schedule.timesteps) >= 20


def test_a_noise_scheduler_that_only_looks_linear_at_first_has_no_table() -> None:
    class Odd(diffusers.DDIMScheduler):  # type: ignore[misc]
        def step(self, *args: Any, **options: Any) -> Any:
            latents, *rest = super().step(*args, **options)
            at = self.timesteps.tolist().index(int(args[1]))
            return (latents + 1e-3 * latents**2 if at == 4 else latents, *rest)

    noise_scheduler = Odd.from_config(make("DDIMScheduler").config)
    assert schedule_reading.read(noise_scheduler, 4).rows is not None
    assert schedule_reading.read(noise_scheduler, 6).rows is None


def test_the_depth_is_what_the_table_needs() -> None:
    assert schedule_reading.read(make("DDIMScheduler"), 8).depth == 0
    assert schedule_reading.read(make("DPMSolverMultistepScheduler"), 8).depth == 1
    assert schedule_reading.read(make("PNDMScheduler"), 8).depth == 3


def test_copies_of_a_noise_scheduler_have_a_history_of_their_own() -> None:
    schedule = schedule_reading.read(make("PNDMScheduler"), 8)
    first, second = schedule.noise_scheduler(), schedule.noise_scheduler()
    first.step(torch.ones(1, 4, 2, 2), schedule.timesteps[0], torch.ones(1, 4, 2, 2))
    assert (len(first.ets), len(second.ets), len(schedule.template.ets)) == (1, 0, 0)


def test_a_noise_scheduler_may_walk_more_steps_than_were_asked_for() -> None:
    assert len(schedule_reading.read(make("PNDMScheduler"), 8).timestep_values) == 9
    assert len(schedule_reading.read(make("HeunDiscreteScheduler"), 8).timestep_values) == 15
