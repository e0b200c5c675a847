from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dreambooth.diffusion.loss import dreambooth_loss
from dreambooth.fast.graphed_passes import GraphedPasses, without_capture
from dreambooth.fast.master_weights import MasterWeights
from dreambooth.training import loop

Make = Callable[..., Any]
ATEN = torch.ops.aten
LR = 1e-3


class RefusesToWait(TorchDispatchMode):
    """Fails if a value is copied to the host, which would wait for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (ATEN._local_scalar_dense.default, ATEN.equal.default), func
        return func(*args, **(kwargs or {}))


def masters_with_gradients(
    training: Any, limit: float = 1.0, size: float = 1.0, **changes: Any
) -> MasterWeights:
    masters = MasterWeights(training.state, limit, **changes)
    draw = torch.Generator().manual_seed(7)
    for half in masters.unet.parameters():
        half.grad = (size * torch.randn(half.shape, generator=draw)).to(half)
    return masters


def passes() -> torch.Tensor:
    return torch.zeros(3)


def test_the_norm_is_that_of_half_gradients_in_full_precision(make_training: Make) -> None:
    training = make_training(mixed_precision="bf16", fast_step=True)
    masters = masters_with_gradients(training)
    gradients = [half.grad.double().flatten() for half in masters.unet.parameters()]
    assert masters.collect(passes).tolist() == [0, 0, 0]
    assert float(masters.norm()) == pytest.approx(float(torch.cat(gradients).norm()), rel=1e-5)


@pytest.mark.parametrize("limit", [1.0, 1e9], ids=["clipped", "whole"])
@pytest.mark.parametrize("elements", [1, 10_000, 2**26])
def test_an_update_is_adamws_on_fp32_gradients_in_parts_of_any_size(
    make_training: Make, limit: float, elements: int
) -> None:
    training = make_training(mixed_precision="bf16", fast_step=True)
    plain = make_training(mixed_precision="bf16")
    for _ in range(2):
        masters = masters_with_gradients(training, limit, part_elements=elements)
        halves = list(masters.unet.parameters())
        for parameter, half in zip(plain.state.unet.parameters(), halves, strict=True):
            parameter.grad = half.grad.float().contiguous()
        norm = masters.norm()
        factor = (limit / (norm + 1e-6)).clamp(max=1.0)
        for parameter in plain.state.unet.parameters():
            parameter.grad.mul_(factor)
        assert masters.update(passes)
        plain.state.optimizer.step()
    assert torch.equal(training.weights(), plain.weights())
    for master, half in zip(training.state.unet.parameters(), halves, strict=True):
        assert master.dtype == torch.float32
        assert half.dtype == torch.bfloat16
        assert torch.equal(half, master.to(torch.bfloat16))
        assert master.grad is None
        assert half.grad is not None  # it stays, because a captured call will write to it again
    sizes = [len(group["params"]) for group in training.state.optimizer.param_groups]
    assert sizes == [len(group["params"]) for group in plain.state.optimizer.param_groups]


def test_nothing_in_a_step_waits_for_the_device(make_training: Make) -> None:
    training = make_training(mixed_precision="bf16", fast_step=True)
    masters = MasterWeights(training.state, 1.0)

    def one_pass(noisy: Tensor, timesteps: Tensor, text: Tensor, target: Tensor) -> Tensor:
        model_pred = loop.predict(masters.unet, noisy, timesteps, text)
        losses = dreambooth_loss(model_pred, target, instances=1, prior_loss_weight=1.0)
        training.state.precision.backward(losses.total)
        return losses.total.detach()

    graphed = GraphedPasses(one_pass, list(masters.unet.parameters()), without_capture)
    latents, text = torch.ones(1, 4, 8, 8), training.data.instance_text
    given = latents, torch.tensor([500]), text, latents
    before = training.weights()
    with RefusesToWait():
        masters.collect(lambda: graphed(*given))
        masters.norm()
        assert masters.update(passes)
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            float(masters.norm())
    assert not torch.equal(training.weights(), before)


def test_fp16_gradients_are_unscaled_and_an_overflow_moves_no_weight(make_training: Make) -> None:
    training = make_training(mixed_precision="fp16", fast_step=True)
    scaler = training.state.precision.scaler
    scaler.scale(torch.zeros(()))  # the first loss initializes the scale
    scale = scaler.get_scale()
    masters = masters_with_gradients(training, size=1e-3)
    gradients = [half.grad.double().flatten() for half in masters.unet.parameters()]
    expected = float(torch.cat(gradients).norm()) / scale
    assert float(masters.norm()) == pytest.approx(expected, rel=1e-5)
    first = next(masters.unet.parameters())
    kept = copy.deepcopy(first.grad)
    first.grad.view(-1)[0] = math.inf
    before = training.weights()
    assert math.isinf(masters.norm())
    assert not masters.update(passes)
    assert torch.equal(training.weights(), before)
    assert scaler.get_scale() == scale / 2
    first.grad.copy_(kept)
    assert float(masters.norm()) == pytest.approx(2 * expected, rel=1e-5)
    assert masters.update(passes)
    assert not torch.equal(training.weights(), before)


def test_half_weights_are_laid_out_as_their_masters(make_training: Make) -> None:
    training = make_training(mixed_precision="bf16", fast_step=True)
    masters = MasterWeights(training.state, 1.0)
    # Otherwise `_foreach_copy_` goes weight by weight, with strides.
    pairs = zip(masters.unet.parameters(), training.state.unet.parameters(), strict=True)
    for half, weight in pairs:
        assert half.stride() == weight.stride()
        assert weight.is_contiguous()
    assert masters.unet.training
