"""Explain why an expected GPU cannot be used, before a job spends hours on a CPU.

torch from the package index is built for one CUDA version and needs a driver at least as new. With
an older driver `torch.cuda.is_available()` is merely False; on a GPU that the build has no kernels
for it is True, and the first kernel fails. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from dreambooth.errors import ResourceError, UserError

_VERSION_FILE = Path("/proc/driver/nvidia/version")
_DEVICES = Path("/dev")

# The oldest driver of each CUDA generation (NVIDIA's CUDA compatibility page, table of minor
# version compatibility).
_OLDEST_DRIVERS = {11: "450", 12: "525", 13: "580"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The NVIDIA driver and GPUs of this machine.

    driver: version of NVIDIA's kernel module, None without one. gpus: number of device files.
    """

    driver: str | None
    gpus: int


def inspect_machine(version_file: Path = _VERSION_FILE, devices: Path = _DEVICES) -> Machine:
    """Return the driver and GPUs that the kernel shows, whether or not torch can use them."""
    try:
        found = re.search(r"Module\s+(?:\S+\s+)*?(\d+\.\d+(?:\.\d+)?)", version_file.read_text())
    except (OSError, UnicodeError):
        found = None
    gpus = [path for path in devices.glob("nvidia*") if path.name[len("nvidia") :].isdigit()]
    return Machine(driver=found.group(1) if found else None, gpus=len(gpus))


def gpu_promise(environ: Mapping[str, str], machine: Machine) -> str | None:
    """Return the words that say what promises a GPU, or None if nothing does.

    SM_NUM_GPUS promises one, and so does a machine that shows one. CUDA_VISIBLE_DEVICES set to
    nothing or to -1 asks for the CPU and overrides both.
    """
    if environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    count = environ.get("SM_NUM_GPUS", "").strip()
    if count.isdigit() and int(count) > 0:
        return f"SM_NUM_GPUS={count} promises a GPU"
    if machine.gpus:
        return f"this machine shows {machine.gpus} NVIDIA GPU{'s' * (machine.gpus > 1)}"
    return None


def refuse_cpu(
    environ: Mapping[str, str], machine: Machine, *, torch_version: str, cuda_version: str | None
) -> None:
    """Raise ResourceError if a GPU was promised, because a job would take hours on a CPU.

    Call it, like `why_unused`, only when torch sees no CUDA device.
    """
    reason = why_unused(environ, machine, torch_version=torch_version, cuda_version=cuda_version)
    if reason is not None:
        raise ResourceError(reason)


def why_unused(
    environ: Mapping[str, str], machine: Machine, *, torch_version: str, cuda_version: str | None
) -> str | None:
    """Return why torch cannot use the promised GPU and what to do; None without a promise.

    torch_version: torch.__version__. cuda_version: torch.version.cuda, None for a CPU build.
    """
    promise = gpu_promise(environ, machine)
    if promise is None:
        return None
    cure = "Set CUDA_VISIBLE_DEVICES=-1 to use the CPU on purpose."
    if cuda_version is None:
        return (
            f"{promise}, but torch {torch_version} is a build without CUDA: install the CUDA build "
            f"(build the image on a machine where pip finds it). {cure}"
        )
    if machine.driver is None:
        return (
            f"{promise}, but no NVIDIA driver can be seen from here: start a container with "
            f"--gpus all (NVIDIA container toolkit), or install a driver. {cure}"
        )
    cuda = int(cuda_version.split(".")[0])
    oldest = _OLDEST_DRIVERS.get(cuda, max(_OLDEST_DRIVERS.values()))
    return (
        f"{promise}, but torch {torch_version} (CUDA {cuda_version}) cannot use it with the driver "
        f"{machine.driver}: CUDA {cuda} needs a driver of the {oldest} series or newer; update "
        "the driver (on SageMaker: InferenceAmiVersion), or build the image with "
        f"--build-arg TORCH_INDEX=<an index with a build for an older CUDA>. {cure}"
    )


def refuse_gpu_without_kernels(torch: ModuleType) -> None:
    """Raise UserError if the GPU that torch will use is one that it has no kernels for."""
    if not torch.cuda.is_available():
        return
    major, minor = torch.cuda.get_device_capability()
    built_for = torch.cuda.get_arch_list()
    if not built_for or has_kernels((major, minor), built_for):
        return
    raise UserError(
        f"The GPU {torch.cuda.get_device_name()} has compute capability {major}.{minor}, and torch "
        f"{torch.__version__} has kernels for {', '.join(built_for)} only: build the image with "
        "--build-arg TORCH_INDEX=<an index with a build for this GPU>, or take another GPU. Set "
        "CUDA_VISIBLE_DEVICES=-1 to use the CPU on purpose."
    )


def has_kernels(capability: tuple[int, int], built_for: Sequence[str]) -> bool:
    """Return whether a GPU runs code that was built for one of these architectures.

    sm_86 is binary code, for compute capability 8.6 to 8.9. compute_86 is PTX, which the driver
    compiles for any from 8.6 on. sm_90a is for 9.0 alone. Unknown names are taken to fit.
    """
    return any(_runs(capability, name) for name in built_for)


def _runs(capability: tuple[int, int], name: str) -> bool:
    found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name)
    if found is None:
        return True
    kind, major, minor, variant = found.groups()
    oldest = (int(major), int(minor))
    if variant == "a":
        return capability == oldest
    crosses_families = kind == "compute" and not variant
    return capability >= oldest and (crosses_families or capability[0] == oldest[0])
