"""The float type that a model draws in, on the device at hand."""

from __future__ import annotations

import torch

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def dtype_for(precision: str, device: torch.device) -> torch.dtype:
    """Return the type of "fp32", "fp16" or "bf16"; "auto": fp32 on a CPU, a half type on a GPU."""
    if precision == "auto":
        if device.type != "cuda":
            return torch.float32
        # bf16 arithmetic is fast from compute capability 8.0 on; its range knows no overflow.
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if fast else torch.float16
    return PRECISIONS[precision]
