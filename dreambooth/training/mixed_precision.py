"""Mixed precision: autocast for forward passes, loss scaling for fp16. Master weights stay fp32.

Weights that are bf16 themselves (stochastic rounding) need neither: all is computed in bf16.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from dreambooth.training.plan import TrainingPlan

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Precision:
    """One of no, fp16, bf16 on one device.

    fp16 scales the loss (Micikevicius et al. 2018, section 3.2): a step whose gradients overflow is
    skipped and the scale is lowered. On bf16 and fp32 the scaler is off and changes nothing.
    """

    def __init__(
        self,
        mixed_precision: str,
        device: torch.device,
        *,
        half_weights: bool = False,
        keeps_copies: bool = True,
    ) -> None:
        self.dtype = DTYPES[mixed_precision]
        self.device = device
        self._casts = self.dtype != torch.float32 and not half_weights
        self._keeps_copies = keeps_copies
        self.scaler = torch.amp.GradScaler(device.type, enabled=mixed_precision == "fp16")

    @classmethod
    def of(cls, plan: TrainingPlan, device: torch.device) -> Precision:
        """As the plan wants it; where it saves memory, no half copy of a weight outlives its use.

        All of them are 1.6 GiB for Stable Diffusion.
        """
        return cls(
            plan.mixed_precision,
            device,
            half_weights=plan.rounds_stochastically,
            keeps_copies=not plan.gradient_checkpointing,
        )

    def autocast(self) -> AbstractContextManager[Any]:
        """Forward passes run in the half type inside this context; nothing changes for fp32."""
        return torch.autocast(
            self.device.type,
            dtype=self.dtype if self._casts else None,
            enabled=self._casts,
            cache_enabled=self._keeps_copies,
        )

    def backward(self, loss: torch.Tensor) -> None:
        """Back-propagate the scaled loss."""
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def frozen_copy(self, network: nn.Module) -> nn.Module:
        """A copy without gradients, in half the memory where autocast would halve it at each call.

        What it computes is the same, bit for bit: layers that autocast computes in half have their
        weights cast once, here, and the rest stays fp32.
        """
        frozen = copy.deepcopy(network).requires_grad_(False).eval()
        for layer in frozen.modules():
            if self._casts and isinstance(layer, nn.Linear | nn.modules.conv._ConvNd):
                layer.to(self.dtype)
        return frozen

    @property
    def loss_scale(self) -> float:
        """What gradients are too large by; 1 but for fp16."""
        return self.scaler.get_scale() if self.scaler.is_enabled() else 1.0

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Bring the gradients back to their true size; call once before clipping."""
        self.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Update the weights; False where fp16 gradients overflowed and the update was skipped."""
        scale = self.loss_scale
        self.scaler.step(optimizer)
        self.scaler.update()
        return self.loss_scale >= scale

    def adapt_scale(self, norm: torch.Tensor) -> bool:
        """As `step`, after an update that others made, or left undone, by the gradients' norm."""
        if not self.scaler.is_enabled():
            return True
        # The scaler looks for overflows in an optimizer's gradients: here, in the norm alone.
        probe = nn.Parameter(torch.zeros_like(norm))
        probe.grad = norm.clone()
        optimizer = torch.optim.SGD([probe], lr=0.0)
        self.scaler.unscale_(optimizer)
        return self.step(optimizer)
