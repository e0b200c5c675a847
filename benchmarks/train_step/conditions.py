"""What a watched process is held to: a share of the GPU's memory, a T4's attention kernels."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

GIB = 2**30
T4_MEMORY_GIB = 13.0  # of its 14.6; CUDA's context and the libraries take the rest


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """memory_gib: all that torch may reserve on the GPU; the context and libraries come on top.

    as_t4: scaled dot product attention without its flash and cuDNN kernels, which a T4 has not;
    that a T4 computes in fp16 is said to the script. stand_in: `torchvision.transforms` is ours.
    """

    memory_gib: float | None = None
    as_t4: bool = False
    stand_in: bool = False

    def impose(self, torch: ModuleType) -> None:
        """Hold this process to them; call before anything is allocated.

        Raises RuntimeError where memory is to be capped and there is no GPU.
        """
        if self.as_t4:
            torch.backends.cuda.enable_flash_sdp(False)
            torch.backends.cuda.enable_cudnn_sdp(False)
        if self.memory_gib is not None:
            device = torch.cuda.current_device()
            total = torch.cuda.get_device_properties(device).total_memory
            share = min(1.0, self.memory_gib * GIB / total)
            torch.cuda.set_per_process_memory_fraction(share, device)
