"""AdamW over the trained parts: plain, or bitsandbytes' 8-bit states."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from dreambooth.errors import ResourceError
from dreambooth.hyperparameters import Hyperparameters


def decay_groups(modules: Iterable[nn.Module], weight_decay: float) -> list[dict[str, object]]:
    """Two parameter groups: weight decay spares biases and LayerNorm weights (published text)."""
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
    modules: Iterable[nn.Module], hyperparameters: Hyperparameters, *, use_8bit_adam: bool
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019) with the published hyperparameters.

    Raises ResourceError where 8-bit states are asked for and bitsandbytes cannot be loaded.
    """
    groups = decay_groups(modules, hyperparameters.adam_weight_decay)
    settings = {
        "lr": hyperparameters.learning_rate,
        "betas": (hyperparameters.adam_beta1, hyperparameters.adam_beta2),
        "eps": hyperparameters.adam_epsilon,
    }
    if use_8bit_adam:
        try:
            import bitsandbytes
        except (ImportError, RuntimeError, OSError) as error:
            raise ResourceError(
                f"8-bit AdamW needs bitsandbytes, which cannot be loaded here ({error}); "
                "install it or set use_8bit_adam to False."
            ) from error
        optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(groups, **settings)
        return optimizer
    # One fused pass over the many small tensors; on CUDA torch's default stays until measured.
    on_cpu = all(p.device.type == "cpu" for group in groups for p in group["params"])  # type: ignore[attr-defined]
    return torch.optim.AdamW(groups, fused=True if on_cpu else None, **settings)  # type: ignore[arg-type]
