"""The float type in which a model draws pictures on a device."""

from __future__ import annotations

import torch

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def dtype_for(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of "fp32", "fp16", "bf16" or "auto": fp32 on a CPU, a half type on a GPU."""
    if precision == "auto":
        if device.type != "cuda":
            return torch.float32
        # bf16 is fast from compute capability 8.0 on, and has the range of fp32, so no overflow.
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if fast else torch.float16
    return PRECISIONS[precision]
