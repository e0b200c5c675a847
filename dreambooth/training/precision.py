"""Mixed precision: autocast for forward passes, loss scaling for fp16. Master weights stay fp32."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Precision:
    """One of no, fp16, bf16 on one device.

    fp16 scales the loss (Micikevicius et al. 2018, section 3.2): a step whose gradients overflow is
    skipped and the scale is lowered. On bf16 and fp32 the scaler is off and changes nothing.
    """

    def __init__(self, mixed_precision: str, device: torch.device) -> None:
        self.dtype = DTYPES[mixed_precision]
        self.device = device
        self.scaler = torch.amp.GradScaler(device.type, enabled=mixed_precision == "fp16")

    def autocast(self) -> AbstractContextManager[Any]:
        """Forward passes run in the half type inside this context; nothing changes for fp32."""
        enabled = self.dtype != torch.float32
        return torch.autocast(
            self.device.type, dtype=self.dtype if enabled else None, enabled=enabled
        )

    def backward(self, loss: torch.Tensor) -> None:
        """Back-propagate the scaled loss."""
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Bring the gradients back to their true size; call once before clipping."""
        self.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Update the weights; False where fp16 gradients overflowed and the update was skipped."""
        scale = self.scaler.get_scale() if self.scaler.is_enabled() else 1.0
        self.scaler.step(optimizer)
        self.scaler.update()
        return not self.scaler.is_enabled() or self.scaler.get_scale() >= scale
