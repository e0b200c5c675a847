"""Finds the kind, memory and arithmetic of the training device, for the training plan.

Standard library only: `visible_gpus` runs nvidia-smi, for `--dry-run` and to count the processes,
and a process that trains asks torch (passed to `from_torch`); both give the same facts.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
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


def visible_gpus(environ: Mapping[str, str]) -> tuple[DeviceFacts, ...]:
    """Return the GPUs that nvidia-smi lists and CUDA_VISIBLE_DEVICES leaves; torch is not imported.

    Of GPUs in MIG mode there is one, because a process sees no more than one of their parts.
    """
    if shutil.which("nvidia-smi") is None:
        return ()
    query = [
        "nvidia-smi",
        "--query-gpu=uuid,mig.mode.current,name,memory.total,memory.free,compute_cap",
        "--format=csv,noheader,nounits",
    ]
    gpus: dict[str, DeviceFacts] = {}
    is_split = False
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True)
        for row in answer.stdout.splitlines():
            uuid, mig_mode, name, total, free, capability = row.split(", ")
            major, minor = capability.split(".")
            mebibytes = int(total), int(free)
            is_split = is_split or mig_mode == "Enabled"
            gpus[uuid] = DeviceFacts(
                kind="cuda",
                name=name,
                compute_capability=(int(major), int(minor)),
                memory_bytes=mebibytes[0] * 2**20,
                free_bytes=max(0, mebibytes[1] * 2**20 - CONTEXT_BYTES),
            )
    except (OSError, subprocess.SubprocessError, ValueError):
        return ()
    wanted = environ.get("CUDA_VISIBLE_DEVICES")
    found = tuple(gpus.values()) if wanted is None else tuple(_chosen(wanted, gpus))
    return found[:1] if is_split else found


def _chosen(wanted: str, gpus: Mapping[str, DeviceFacts]) -> Iterator[DeviceFacts]:
    """Yield the GPUs, by their UUIDs, that CUDA_VISIBLE_DEVICES lists as numbers or UUIDs.

    As CUDA reads it, the list ends before the first entry that is no GPU.
    """
    for entry in wanted.split(","):
        entry = entry.strip()
        if entry.isdecimal():
            matching = list(gpus.values())[int(entry) :][:1]
        elif entry.startswith("MIG-"):
            matching = list(gpus.values())[:1]
        else:
            matching = [facts for uuid, facts in gpus.items() if entry and uuid.startswith(entry)]
        if len(matching) != 1:
            return
        yield matching[0]


def in_common(devices: Sequence[DeviceFacts]) -> DeviceFacts:
    """Return the facts of one device that each of these can stand in for; the CPU if it is one.

    The processes of a job make the same training plan, so they plan for the least of their GPUs.
    """
    if not devices or any(one.kind == "cpu" for one in devices):
        return CPU
    capabilities = [one.compute_capability for one in devices if one.compute_capability]
    memory = [one.memory_bytes for one in devices if one.memory_bytes is not None]
    free = [one.free_bytes for one in devices if one.free_bytes is not None]
    return DeviceFacts(
        kind="cuda",
        name=", ".join(dict.fromkeys(one.name for one in devices)),
        compute_capability=min(capabilities, default=None),
        memory_bytes=min(memory, default=None),
        free_bytes=min(free, default=None),
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
