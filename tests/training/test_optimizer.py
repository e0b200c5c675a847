from __future__ import annotations

import torch
from torch import nn

from dreambooth.hyperparameters import Hyperparameters
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


def test_8bit_states_are_one_byte_per_weight() -> None:
    module = nn.Linear(128, 128)
    made = optimizer.build([module], SETTINGS, use_8bit_adam=True)
    module(torch.ones(1, 128)).sum().backward()
    made.step()
    assert made.state[module.weight]["state1"].dtype == torch.uint8
