from __future__ import annotations

import diffusers
import pytest
import torch

from dreambooth.diffusion.loss import dreambooth_loss, noise_target
from dreambooth.errors import ModelArtifactError


def test_loss_is_the_instance_half_plus_the_weighted_class_half() -> None:
    generator = torch.Generator().manual_seed(0)
    pred, target = (torch.randn(5, 4, 2, 2, generator=generator) for _ in range(2))
    losses = dreambooth_loss(pred, target, instances=2, prior_loss_weight=0.3)
    instance = ((pred[:2] - target[:2]) ** 2).mean()
    class_ = ((pred[2:] - target[2:]) ** 2).mean()
    assert torch.equal(losses.instance, instance)
    assert losses.class_ is not None
    assert torch.equal(losses.class_, class_)
    assert torch.allclose(losses.total, instance + 0.3 * class_)


def test_without_class_rows_there_is_one_term() -> None:
    pred, target = torch.zeros(2, 4, 2, 2), torch.ones(2, 4, 2, 2)
    losses = dreambooth_loss(pred, target, instances=2, prior_loss_weight=5.0)
    assert losses.total == 1.0
    assert losses.class_ is None


def test_half_precision_predictions_are_compared_in_fp32() -> None:
    pred = torch.full((1, 1, 1, 1), 300.0, dtype=torch.float16)
    losses = dreambooth_loss(pred, torch.zeros(1, 1, 1, 1), instances=1, prior_loss_weight=0.0)
    assert losses.total == 90000.0  # more than fp16 can hold


def test_epsilon_models_predict_the_noise() -> None:
    scheduler = diffusers.DDPMScheduler(prediction_type="epsilon")
    latents, noise = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2)
    assert noise_target(scheduler, latents, noise, torch.tensor([5])) is noise


def test_v_prediction_models_predict_the_velocity() -> None:
    scheduler = diffusers.DDPMScheduler(prediction_type="v_prediction")
    latents, noise = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2)
    alpha_bar = scheduler.alphas_cumprod[500]
    velocity = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latents
    target = noise_target(scheduler, latents, noise, torch.tensor([500]))
    assert torch.allclose(target, velocity)


def test_other_prediction_types_are_refused() -> None:
    scheduler = diffusers.DDPMScheduler(prediction_type="sample")
    zeros = torch.zeros(1, 4, 2, 2)
    with pytest.raises(ModelArtifactError, match="prediction_type is 'sample'"):
        noise_target(scheduler, zeros, zeros, torch.tensor([0]))
