"""What the meter computes, and how often it is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from dreambooth.data.cache import LatentPosteriors
from dreambooth.training import meter as meters
from dreambooth.training.meter import BINS, ROWS_PER_BIN, Meter, MeterReading

PROMPTS = {
    "instance": ("a zwx cat",) * 3,
    "class": ("a cat",) * 3,
    "other_class": ("a dog",) * 3,
    "empty": ("",) * 3,
}


class Model:
    """A model that predicts for each prompt a constant times the timestep's share."""

    def __init__(self) -> None:
        self.constants = {"a zwx cat": 0.4, "a cat": 0.1, "a dog": 0.2, "": 0.0}

    def encode(self, prompt: str) -> torch.Tensor:
        return torch.full((1, 1, 1), self.constants[prompt])

    def predict(
        self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor
    ) -> torch.Tensor:
        return torch.zeros_like(noisy_latents) + text.view(-1, 1, 1, 1)


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def meter(model: Model) -> Meter:
    instance = LatentPosteriors(
        mean=torch.zeros(3, 4, 2, 2),
        std=torch.ones(3, 4, 2, 2),
        first_rows=(0, 1, 2),
        crop_counts=(1, 1, 1),
    )
    made = Meter(
        instance,
        latent_scale=1.0,
        noise_scheduler=DDPMScheduler(),
        seed=3,
        prompts=PROMPTS,
        encode_text=model.encode,
        predict=model.predict,
        interval=10,
        steps=25,
    )
    made.start()
    return made


def test_a_model_that_did_not_move_reads_one_and_no_drift(meter: Meter) -> None:
    reading = meter.read(10, ())
    assert reading.loss == 1
    assert reading.losses == (1.0,) * BINS
    assert set(reading.drifts.values()) == {0.0}
    assert reading.moved == 0
    assert reading.guidance == 1


def test_drift_is_a_share_of_what_the_subject_moved(meter: Meter, model: Model) -> None:
    model.constants |= {"a zwx cat": 0.8, "a cat": 0.3, "": -0.4}
    reading = meter.read(10, ())
    assert reading.moved == pytest.approx(0.16)
    assert reading.drifts == pytest.approx({"class": 0.25, "other_class": 0.0, "empty": 1.0})
    assert reading.guidance == pytest.approx(1.2 / 0.4)


def test_the_loss_is_against_the_noise_by_quarter_of_the_timesteps(model: Model) -> None:
    scheduler, low = DDPMScheduler(), 250

    def predict(noisy: torch.Tensor, timesteps: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        wrong = torch.zeros_like(noisy) + model.constants["a cat"]
        right = noisy / (1 - scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)).sqrt()
        is_low = (timesteps < low).view(-1, 1, 1, 1) & torch.tensor(model.constants[""] > 0)
        return torch.where(is_low, right, wrong)

    zero = LatentPosteriors(
        mean=torch.zeros(1, 4, 2, 2),
        std=torch.zeros(1, 4, 2, 2),
        first_rows=(0,),
        crop_counts=(1,),
    )
    made = Meter(
        zero,
        latent_scale=1.0,
        noise_scheduler=scheduler,
        seed=3,
        prompts=PROMPTS,
        encode_text=model.encode,
        predict=predict,
        interval=10,
        steps=25,
    )
    made.start()
    model.constants[""] = 1.0  # from now on the noise of the first quarter is known exactly
    reading = made.read(10, ())
    assert reading.losses == pytest.approx((0.0, 1.0, 1.0, 1.0), abs=1e-9)
    assert 0.5 < reading.loss < 1


def test_convergence_compares_the_last_losses_with_all(meter: Meter) -> None:
    there = [reading(step=10 * n, loss=1 - n / 10) for n in range(1, 4)]
    found = meter.read(40, there)
    assert found.convergence is not None  # 1, .9, .8, .7 and 1: four of five
    assert found.convergence == pytest.approx(0.0125 / 0.0136)
    assert meter.read(20, there[:2]).convergence is None


def reading(**changes: Any) -> MeterReading:
    plain = MeterReading(
        step=1,
        loss=0.5,
        losses=(0.5,) * BINS,
        drifts={"empty": 0.25},
        moved=0.1,
        guidance=1.5,
        convergence=None,
    )
    return replace(plain, **changes)


def test_a_reading_comes_back_from_json() -> None:
    for one in (reading(), reading(convergence=0.25)):
        assert MeterReading.from_json(one.as_json()) == one
    whole = reading().as_json()
    for damaged in ({}, {**whole, "losses": None}, {**whole, "loss": ""}):
        with pytest.raises((ValueError, KeyError, TypeError)):
            MeterReading.from_json(damaged)


def test_it_is_due_once_in_each_interval_and_at_the_end(meter: Meter) -> None:
    due = [step for step in range(1, 26) if meter.is_due(step, step - 1)]
    assert due == [10, 20, 25]
    assert meter.is_due(13, 7)  # steps that are read together
    assert not meter.is_due(13, 10)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"batch_size": 4},
        {"with_prior_preservation": True, "num_class_images": 2},
        {"with_prior_preservation": True, "prior_preservation_mode": "prediction"},
        {"memory_plan": "8bit_adamw_in_backward"},
    ],
)
def test_all_readings_together_take_at_most_a_tenth_of_the_rows(
    make_training: Callable[..., Any], changes: dict[str, Any]
) -> None:
    training = make_training(max_steps=400, **changes)
    interval = meters.reading_interval(training.plan, training.settings)
    assert interval is not None
    readings = 1 + -(-400 // interval)  # the base's too
    rows = readings * BINS * (ROWS_PER_BIN + 3)
    per_step = training.plan.batch_size * (1 + bool(changes.get("with_prior_preservation"))) * 3
    assert rows <= 0.1 * 400 * per_step * (4 if "memory_plan" in changes else 1.2)
    assert meters.reading_interval(replace(training.plan, steps=5), training.settings) is None
