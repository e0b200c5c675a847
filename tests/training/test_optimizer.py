from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dreambooth.settings.hyperparameters import Hyperparameters
from dreambooth.training import optimizer

SETTINGS = Hyperparameters(
    learning_rate=3e-4, adam_weight_decay=0.2, adam_beta1=0.5, adam_beta2=0.7, adam_epsilon=1e-3
)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Conv2d(1, 1, 1), nn.GroupNorm(1, 4))


def test_biases_and_layer_norm_weights_do_not_decay() -> None:
    module = network()
    decayed, exempt = optimizer.decay_groups([module], 0.2)
    linear, layer_norm, convolution, group_norm = module
    assert decayed["weight_decay"] == 0.2
    assert exempt["weight_decay"] == 0.0
    assert {id(p) for p in decayed["params"]} == {
        id(linear.weight),
        id(convolution.weight),
        id(group_norm.weight),
    }
    assert {id(p) for p in exempt["params"]} == {
        id(p) for p in (linear.bias, layer_norm.weight, layer_norm.bias, convolution.bias)
    } | {id(group_norm.bias)}


def test_frozen_parameters_are_left_out() -> None:
    module = network()
    module[0].requires_grad_(False)
    groups = optimizer.decay_groups([module], 0.2)
    assert sum(len(group["params"]) for group in groups) == 6


def test_hyperparameters_arrive_at_adamw() -> None:
    for eight_bit in (False, True):
        made = optimizer.build([network()], SETTINGS, use_8bit_adam=eight_bit)
        for group, decay in zip(made.param_groups, (0.2, 0.0), strict=True):
            assert group["lr"] == 3e-4
            assert tuple(group["betas"]) == (0.5, 0.7)
            assert group["eps"] == 1e-3
            assert group["weight_decay"] == decay


class Called(TorchDispatchMode):
    """Collects the names of the operations that torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def simulated_cuda_network() -> nn.Module:
    """Return a network of fake tensors that claim to be on a GPU; for use in FakeTensorMode."""
    module = network()
    for part in module:
        for name, weight in list(part.named_parameters(recurse=False)):
            simulated = nn.Parameter(torch.empty(weight.shape, device="cuda"))
            simulated.grad = torch.empty_like(simulated)
            setattr(part, name, simulated)
    return module


def test_adamw_on_cuda_is_one_fused_pass() -> None:
    with FakeTensorMode():
        made = optimizer.build([simulated_cuda_network()], SETTINGS, use_8bit_adam=False)
        with Called() as called:
            made.step()
    assert called.names.count("aten._fused_adamw_.default") == 2  # groups with and without decay
    assert not [name for name in called.names if "sqrt" in name]  # foreach's temporary copy


@pytest.mark.parametrize("saved_by", ["fused", "foreach"])
def test_states_of_either_kernel_are_resumed(saved_by: str) -> None:
    """Older checkpoints from a GPU were written by foreach, which counts its steps on the host."""
    torch.manual_seed(0)
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.load_state_dict(first.state_dict())
    groups = optimizer.decay_groups([first], 0.2)
    given = {"lr": 3e-4, "betas": (0.5, 0.7), "eps": 1e-3, saved_by: True}
    other = torch.optim.AdamW(groups, **given)  # type: ignore[arg-type]
    first(torch.ones(4)).sum().backward()
    other.step()
    saved = other.state_dict()
    second.load_state_dict(first.state_dict())
    second(torch.ones(4)).sum().backward()
    made = optimizer.build([second], SETTINGS, use_8bit_adam=False)
    optimizer.load(made, saved)
    for one in (made, other):
        one.step()
    for mine, theirs in zip(second.parameters(), first.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)


def test_8bit_states_are_one_byte_per_weight() -> None:
    module = nn.Linear(128, 128)
    made = optimizer.build([module], SETTINGS, use_8bit_adam=True)
    module(torch.ones(1, 128)).sum().backward()
    made.step()
    assert made.state[module.weight]["state1"].dtype == torch.uint8
