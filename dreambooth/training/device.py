"""Finds the kind, memory and arithmetic of the training device, for the training plan.

Standard library only: `--dry-run` runs nvidia-smi and a job asks torch (which it passes to
`from_torch`); both give the same facts.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from types import ModuleType
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFacts:
    """The facts of the training device; on a CPU all but kind and name are None.

    compute_capability: (major, minor). memory_bytes: of the whole GPU. free_bytes: what this
    process may allocate of it beside its CUDA context; None if unknown.
    """

    kind: Literal["cpu", "cuda"]
    name: str
    compute_capability: tuple[int, int] | None = None
    memory_bytes: int | None = None
    free_bytes: int | None = None

    @property
    def mixed_precision(self) -> str:
        """Return "no" on a CPU, "bf16" from compute capability 8.0 on, and "fp16" below."""
        if self.compute_capability is None:
            return "no"
        return "bf16" if self.compute_capability >= (8, 0) else "fp16"

    @property
    def has_tf32(self) -> bool:
        """Return whether torch computes convolutions of fp32 tensors in TF32 here."""
        return self.compute_capability is not None and self.compute_capability >= (8, 0)


CONTEXT_BYTES = int(0.4 * 2**30)  # CUDA context, not there yet when nvidia-smi runs

CPU = DeviceFacts(kind="cpu", name="CPU")


def from_driver() -> DeviceFacts:
    """Return the first GPU that nvidia-smi lists, or the CPU; torch is not imported."""
    if shutil.which("nvidia-smi") is None:
        return CPU
    query = [
        "nvidia-smi",
        "--query-gpu=name,memory.total,memory.free,compute_cap",
        "--format=csv,noheader,nounits",
    ]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True)
        name, total, free, capability = answer.stdout.splitlines()[0].split(", ")
        major, minor = capability.split(".")
        mebibytes = int(total), int(free)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return CPU
    return DeviceFacts(
        kind="cuda",
        name=name,
        compute_capability=(int(major), int(minor)),
        memory_bytes=mebibytes[0] * 2**20,
        free_bytes=max(0, mebibytes[1] * 2**20 - CONTEXT_BYTES),
    )


def process_memory_bytes(pid: int) -> int | None:
    """Return the memory of a process on all GPUs, as the driver counts it (NVML, by nvidia-smi).

    It includes torch's memory, the CUDA context and the libraries. None without a driver, before
    the process uses a GPU, and if the driver lists the process under another number, as in a
    container that has its own process numbers.
    """
    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True)
        rows = [row.split(", ") for row in answer.stdout.splitlines()]
        mebibytes = [int(used) for number, used in rows if int(number) == pid]
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return sum(mebibytes) * 2**20 if mebibytes else None


def host_memory_bytes() -> int:
    """Return the physical memory of the machine; 0 if the system does not report it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return 0


def from_torch(torch: ModuleType) -> DeviceFacts:
    """Return the GPU that torch will use, or the CPU."""
    if not torch.cuda.is_available():
        return CPU
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    allowed = torch.cuda.get_per_process_memory_fraction() * properties.total_memory
    return DeviceFacts(
        kind="cuda",
        name=properties.name,
        compute_capability=(properties.major, properties.minor),
        memory_bytes=properties.total_memory,
        free_bytes=min(torch.cuda.mem_get_info()[0], int(allowed)),
    )
