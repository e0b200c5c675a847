"""Limit a measured process to a share of the GPU's memory and to a T4's attention kernels."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

GIB = 2**30
T4_MEMORY_GIB = 13.0  # of 14.6; the rest is for CUDA's context and the libraries


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """The restrictions under which a script is measured.

    memory_gib: all that torch may reserve on the GPU; the context and libraries come on top.
    as_t4: scaled dot product attention without flash and cuDNN kernels, which a T4 does not have;
    its fp16 is set by the script's own options. stand_in: replace `torchvision.transforms` by
    transforms_stand_in.py.
    """

    memory_gib: float | None = None
    as_t4: bool = False
    stand_in: bool = False

    def impose(self, torch: ModuleType) -> None:
        """Apply memory_gib and as_t4 to this process; call it before anything is allocated.

        Raises RuntimeError if memory is to be capped and there is no GPU.
        """
        if self.as_t4:
            torch.backends.cuda.enable_flash_sdp(False)
            torch.backends.cuda.enable_cudnn_sdp(False)
        if self.memory_gib is not None:
            device = torch.cuda.current_device()
            total = torch.cuda.get_device_properties(device).total_memory
            share = min(1.0, self.memory_gib * GIB / total)
            torch.cuda.set_per_process_memory_fraction(share, device)
