from __future__ import annotations

import pytest
import torch
from torch import nn

from dreambooth.diffusion import model as models
from dreambooth.training import loop
from dreambooth.training.mixed_precision import Precision

CPU = torch.device("cpu")


def product(precision: Precision) -> torch.dtype:
    with precision.autocast():
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


def test_autocast_computes_in_the_chosen_type() -> None:
    assert product(Precision("no", CPU)) == torch.float32
    assert product(Precision("bf16", CPU)) == torch.bfloat16
    assert product(Precision("fp16", CPU)) == torch.float16


def test_only_fp16_scales_the_loss() -> None:
    assert Precision("fp16", CPU).scaler.is_enabled()
    assert not Precision("bf16", CPU).scaler.is_enabled()
    assert not Precision("no", CPU).scaler.is_enabled()


def test_an_overflowing_step_is_skipped_and_the_scale_lowered() -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    precision = Precision("fp16", CPU)
    before = precision.scaler.get_scale()
    precision.backward((weight * float("inf")).sum())
    precision.unscale(optimizer)
    assert not precision.step(optimizer, float("inf"))
    assert weight.item() == 1.0
    assert precision.scaler.get_scale() < before
    optimizer.zero_grad()
    precision.backward(weight.sum())
    precision.unscale(optimizer)
    assert weight.grad is not None
    assert weight.grad.item() == 1.0
    assert precision.step(optimizer, 1.0)
    assert weight.item() != 1.0


@pytest.mark.parametrize("keeps", [True, False])
def test_half_copies_of_weights_outlive_their_use_only_where_they_may(keeps: bool) -> None:
    with Precision("bf16", CPU, keeps_copies=keeps).autocast():
        assert torch.is_autocast_cache_enabled() is keeps


def test_the_loss_scale_is_one_but_for_fp16() -> None:
    assert Precision("fp16", CPU).loss_scale > 1
    assert Precision("bf16", CPU).loss_scale == 1


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_frozen_copy_computes_the_same_bits_in_half_the_memory(
    loaded_small_model: models.DiffusionModel, precision: str
) -> None:
    unet = loaded_small_model.unet
    chosen = Precision(precision, CPU)
    frozen = chosen.frozen_copy(unet)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 7, unet.config.cross_attention_dim, generator=generator)
    steps = torch.tensor([3, 700])
    with torch.no_grad(), chosen.autocast():
        expected = unet(latents, steps, text).sample
        assert torch.equal(loop.predict(frozen, latents, steps, text), expected)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    share = size(frozen) / size(unet)
    assert share == 1 if precision == "no" else share < 0.51


def size(network: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in network.parameters())
