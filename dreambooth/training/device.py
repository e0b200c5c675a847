"""What the plan must know of the device: is there a CUDA GPU, how much memory, which arithmetic.

Standard library only: `--dry-run` asks the driver's own tool, the job asks torch (`from_torch` is
handed the module), and both give the same facts.
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
    """All but kind and name are None on a CPU.

    compute_capability: (major, minor). memory_bytes: of the whole GPU; free_bytes: of it, what this
    process may take beside its CUDA context, None where nobody said.
    """

    kind: Literal["cpu", "cuda"]
    name: str
    compute_capability: tuple[int, int] | None = None
    memory_bytes: int | None = None
    free_bytes: int | None = None

    @property
    def mixed_precision(self) -> str:
        """fp32 on a CPU, bf16 from compute capability 8.0, fp16 with loss scaling below."""
        if self.compute_capability is None:
            return "no"
        return "bf16" if self.compute_capability >= (8, 0) else "fp16"


CONTEXT_BYTES = int(0.4 * 2**30)  # of CUDA itself, which the driver's tool cannot see yet

CPU = DeviceFacts(kind="cpu", name="CPU")


def from_driver() -> DeviceFacts:
    """The first GPU that nvidia-smi names, without importing torch; the CPU where there is none."""
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
    """What the driver counts for a process on all GPUs (NVML, by nvidia-smi): torch's memory, and
    that of CUDA's context and the libraries.

    None without a driver, before the process uses a GPU, and where the driver does not know it by
    this number: in a container with numbers of its own.
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
    """Physical memory of the machine; 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return 0


def from_torch(torch: ModuleType) -> DeviceFacts:
    """The GPU that torch will use, or the CPU."""
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
