"""AdamW over the trained parts, with fp32 or 8-bit states (bitsandbytes), and its saved states.

Saved fp32 states can be loaded as 8-bit states and the other way round, so that a run whose memory
plan has changed can resume from its checkpoint. What 8 bits cannot represent is lost, as in every
step of such a memory plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dreambooth.errors import ResourceError
from dreambooth.settings.hyperparameters import Hyperparameters


def decay_groups(modules: Iterable[nn.Module], weight_decay: float) -> list[dict[str, object]]:
    """Return two parameter groups; biases and LayerNorm weights do not decay (published text)."""
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for root in modules:
        for module in root.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if not parameter.requires_grad:
                    continue
                is_exempt = name == "bias" or isinstance(module, nn.LayerNorm)
                (exempt if is_exempt else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]


def build(
    modules: Iterable[nn.Module],
    hyperparameters: Hyperparameters,
    *,
    use_8bit_adam: bool,
) -> torch.optim.Optimizer:
    """Return AdamW (Loshchilov and Hutter 2019) with the published hyperparameters.

    Raises ResourceError if 8-bit states are asked for and bitsandbytes cannot be loaded.
    """
    groups = decay_groups(modules, hyperparameters.adam_weight_decay)
    settings = {
        "lr": hyperparameters.learning_rate,
        "betas": (hyperparameters.adam_beta1, hyperparameters.adam_beta2),
        "eps": hyperparameters.adam_epsilon,
    }
    if use_8bit_adam:
        try:
            from dreambooth.training import adamw_8bit
        except (ImportError, RuntimeError, OSError) as error:
            raise ResourceError(
                f"8-bit AdamW needs bitsandbytes, which cannot be loaded here ({error}); "
                "install it or set use_8bit_adam to False."
            ) from error
        in_8bit: torch.optim.Optimizer = adamw_8bit.NonBlockingAdamW8bit(groups, **settings)
        return in_8bit
    # fused makes one pass over all weights. Torch's default on CUDA, foreach, moves 80 bytes per
    # parameter instead of 28 and keeps a temporary copy of all of them.
    return torch.optim.AdamW(groups, fused=True, **settings)  # type: ignore[arg-type]


def load(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Load the state_dict of an optimizer from `build`, whether its states were fp32 or 8-bit.

    Raises ValueError, KeyError or RuntimeError if it belongs to other weights.
    """
    in_8bit = not isinstance(optimizer, torch.optim.AdamW)
    states: Mapping[int, Mapping[str, Any]] = saved["state"]
    if states and any(in_8bit == ("exp_avg" in state) for state in states.values()):
        from dreambooth.training import adamw_8bit

        states = {
            number: adamw_8bit.from_fp32(state) if in_8bit else adamw_8bit.to_fp32(state)
            for number, state in states.items()
        }
    # Settings come from the job and kernels from the plan; only the weights must match.
    groups = optimizer.state_dict()["param_groups"]
    if [len(group["params"]) for group in groups] != [
        len(group["params"]) for group in saved["param_groups"]
    ]:
        raise ValueError("the optimizer's states are of another number of weights")
    optimizer.load_state_dict({"state": dict(states), "param_groups": groups})


@contextmanager
def part_by_part(
    optimizer: torch.optim.Optimizer,
) -> Iterator[Callable[[list[nn.Parameter]], None]]:
    """Yield a function that updates only the given parameters, all of one group.

    Their states stay in the optimizer.
    """
    groups = [(group, group["params"]) for group in optimizer.param_groups]
    group_of = {parameter: group for group, members in groups for parameter in members}

    def step(parameters: list[nn.Parameter]) -> None:
        group = group_of[parameters[0]]
        group["params"] = parameters
        optimizer.step()
        group["params"] = []

    try:
        for group, _ in groups:
            group["params"] = []
        yield step
    finally:
        for group, members in groups:
            group["params"] = members


def clip_factor(norm: torch.Tensor, max_norm: float) -> torch.Tensor:
    """Return the factor that clips gradients of this norm, as in clip_grads_with_norm_."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)
