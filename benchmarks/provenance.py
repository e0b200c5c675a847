"""State where a measured figure comes from: device, driver, versions, commit and date."""

from __future__ import annotations

import datetime
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch

from dreambooth.process import gpu_driver


def facts(device: torch.device) -> dict[str, Any]:
    """Return the facts of this machine, checkout and moment; None for each that is missing."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "driver": gpu_driver.inspect_machine().driver,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,  # type: ignore[no-untyped-call]
        "diffusers": diffusers.__version__,
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def in_words(found: Mapping[str, object]) -> str:
    """Return the facts on one line, without those that are None."""
    return ", ".join(f"{name} {value}" for name, value in found.items() if value is not None)


def _commit() -> str | None:
    """Return the commit, with `-dirty` if files differ from it; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()
