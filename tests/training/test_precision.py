from __future__ import annotations

import torch

from dreambooth.training.precision import Precision

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
    assert not precision.step(optimizer)
    assert weight.item() == 1.0
    assert precision.scaler.get_scale() < before
    optimizer.zero_grad()
    precision.backward(weight.sum())
    precision.unscale(optimizer)
    assert weight.grad is not None
    assert weight.grad.item() == 1.0
    assert precision.step(optimizer)
    assert weight.item() != 1.0
