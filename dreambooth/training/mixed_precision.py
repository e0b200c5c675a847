"""Mixed precision: autocast for forward passes, loss scaling for fp16, fp32 master weights."""

from __future__ import annotations

import copy
import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from dreambooth.training.plan import TrainingPlan

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Precision:
    """The precision of a run (no, fp16 or bf16) on one device.

    fp16 scales the loss (Micikevicius et al. 2018, section 3.2): a step whose gradients overflow is
    skipped and the scale is lowered. With bf16 and fp32 the scaler is off and changes nothing.
    """

    def __init__(
        self,
        mixed_precision: str,
        device: torch.device,
        *,
        keeps_copies: bool = True,
    ) -> None:
        self.dtype = DTYPES[mixed_precision]
        self.device = device
        self._casts = self.dtype != torch.float32
        self._keeps_copies = keeps_copies
        self.scaler = torch.amp.GradScaler(device.type, enabled=mixed_precision == "fp16")

    @classmethod
    def for_plan(cls, plan: TrainingPlan, device: torch.device) -> Precision:
        """Return the precision that the training plan asks for.

        With gradient checkpointing autocast does not keep its half copies of the weights, which
        together take 1.6 GiB for Stable Diffusion.
        """
        return cls(
            plan.mixed_precision,
            device,
            keeps_copies=not plan.gradient_checkpointing,
        )

    def autocast(self, *, keeps_copies: bool = True) -> AbstractContextManager[Any]:
        """Return a context in which forward passes run in the half type; fp32 stays as it is.

        keeps_copies: whether half copies of the weights may be kept until its end.
        """
        return torch.autocast(
            self.device.type,
            dtype=self.dtype if self._casts else None,
            enabled=self._casts,
            cache_enabled=self._keeps_copies and keeps_copies,
        )

    def backward(self, loss: torch.Tensor) -> None:
        """Back-propagate the scaled loss."""
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def frozen_copy(self, network: nn.Module) -> nn.Module:
        """Return a copy without gradients; under autocast it takes half the memory.

        Layers that autocast would cast at each call are cast once, here, and the rest stays fp32,
        so the results are the same, bit for bit.
        """
        frozen = copy.deepcopy(network).requires_grad_(False).eval()
        for layer in frozen.modules():
            if self._casts and isinstance(layer, nn.Linear | nn.modules.conv._ConvNd):
                layer.to(self.dtype)
        return frozen

    @property
    def loss_scale(self) -> float:
        """Return the factor by which gradients are too large; 1 unless fp16 scales the loss."""
        return self.scaler.get_scale() if self.scaler.is_enabled() else 1.0

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the loss scale; call it once before clipping."""
        self.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer, grad_norm: float) -> bool:
        """Update the weights; return False if fp16 gradients overflowed and nothing was updated.

        grad_norm: of the unscaled gradients. It has been read already; the scaler's own step would
        wait for the device again, to read the same of its search for overflows.
        """
        updates = math.isfinite(grad_norm) or not self.scaler.is_enabled()
        if updates:
            optimizer.step()
        self.scaler.update()
        return updates

    def adapt_scale(self, norm: torch.Tensor) -> bool:
        """Adapt the loss scale for a caller that updates the weights itself.

        norm: of the gradients. Return False if it is not finite, as `step` does on an overflow.
        """
        if not self.scaler.is_enabled():
            return True
        # The scaler searches an optimizer's gradients for overflows; this one has only the norm.
        probe = nn.Parameter(torch.zeros_like(norm))
        probe.grad = norm.clone()
        optimizer = torch.optim.SGD([probe], lr=0.0)
        self.scaler.unscale_(optimizer)
        self.scaler.update()
        return bool(torch.isfinite(norm))
