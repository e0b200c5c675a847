"""Everything that a run would lose if it stopped: its state, and checkpoints of it.

A checkpoint is a folder `step-00000400` that holds weights (safetensors), the optimizer (tensors
only) and manifest.json with the SHA-256 of each file. It is written under another name, flushed to
the disk and renamed, so a folder of that name is whole or damaged by others, never half written.
Nothing random is stored: what a step draws is a function of (seed, step).
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dreambooth.durable import fsync
from dreambooth.errors import HyperparameterError, ResourceError
from dreambooth.training.precision import Precision

log = logging.getLogger(__name__)

FORMAT = 1
PREFIX = "step-"


@dataclass(slots=True, kw_only=True)
class TrainingState:
    """step: updates done. skipped_steps: fp16 updates that overflowed and were tried again.

    loss_total: the losses of all steps, summed. checkpoint: the last one written or gone on from.
    """

    unet: nn.Module
    text_encoder: nn.Module | None
    optimizer: torch.optim.Optimizer
    precision: Precision
    step: int = 0
    skipped_steps: int = 0
    loss_total: float = 0.0
    checkpoint: Path | None = None

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """The trained parts by the name of their folder."""
        yield "unet", self.unet
        if self.text_encoder is not None:
            yield "text_encoder", self.text_encoder


def save(state: TrainingState, folder: Path, *, identity: Mapping[str, str], keep: int) -> Path:
    """Write a checkpoint of `state` into `folder` and drop the oldest ones but `keep`.

    identity: what must be equal for a resumed run to go on (settings, data, model), name -> value.
    Raises ResourceError, leaving earlier checkpoints as they were, where the disk is full.
    """
    final = folder / f"{PREFIX}{state.step:08d}"
    partial = folder / f".partial-{final.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for name, module in state.modules():
            tensors = {key: value.contiguous() for key, value in module.state_dict().items()}
            save_file(tensors, partial / f"{name}.safetensors", metadata={"format": "pt"})
        torch.save(state.optimizer.state_dict(), partial / "optimizer.pt")
        manifest = {
            "format": FORMAT,
            "step": state.step,
            "skipped_steps": state.skipped_steps,
            "loss_total": state.loss_total,
            "scaler": state.precision.scaler.state_dict(),
            "identity": dict(identity),
            "environment": environment(),
            "files": {path.name: _sha256(path) for path in sorted(partial.iterdir())},
        }
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=2))
        for path in (*partial.iterdir(), partial):
            fsync(path)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        fsync(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ResourceError(
            f"The checkpoint of step {state.step} cannot be written to {folder}: {error.strerror}. "
            "Free some disk, lower checkpoints_total_limit, or give another --checkpoint_dir."
        ) from error
    others = [path for path in _checkpoints(folder) if path != final]
    for old in others[keep - 1 :]:
        shutil.rmtree(old, ignore_errors=True)
    state.checkpoint = final
    return final


def clear(folder: Path) -> None:
    """Remove all checkpoints, for a run that starts over; anything else in the folder stays."""
    for path in _checkpoints(folder):
        shutil.rmtree(path, ignore_errors=True)


def load_newest(state: TrainingState, folder: Path, *, identity: Mapping[str, str]) -> bool:
    """Bring `state` to the newest whole checkpoint; False where there is none.

    Damaged checkpoints are skipped with a warning. Raises HyperparameterError, naming what changed,
    where the checkpoint belongs to another job.
    """
    for path in _checkpoints(folder):
        try:
            manifest = _read_manifest(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("checkpoint %s is damaged and skipped: %s", path, error)
            continue
        _compare(path, manifest["identity"], identity)
        if manifest["environment"] != environment():
            log.warning(
                "checkpoint %s was written with %s, this is %s: the last bits may differ",
                path.name,
                manifest["environment"],
                environment(),
            )
        for name, module in state.modules():
            module.load_state_dict(load_file(path / f"{name}.safetensors"))
        state.optimizer.load_state_dict(
            torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
        )
        state.precision.scaler.load_state_dict(manifest["scaler"])
        state.step = manifest["step"]
        state.skipped_steps = manifest["skipped_steps"]
        state.loss_total = manifest["loss_total"]
        state.checkpoint = path
        return True
    return False


def environment() -> dict[str, str]:
    """What bit-identity depends on beside settings and data: versions, threads, processor."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
    }


def _checkpoints(folder: Path) -> list[Path]:
    """Newest first; anything else in the folder is left alone."""
    found = [
        path
        for path in folder.glob(f"{PREFIX}*")
        if path.is_dir() and path.name.removeprefix(PREFIX).isdecimal()
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)), reverse=True)


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all as it says. Raises ValueError otherwise."""
    manifest: dict[str, Any] = json.loads((path / "manifest.json").read_text())
    if manifest["format"] != FORMAT:
        raise ValueError(f"its format is {manifest['format']}, not {FORMAT}")
    for name, digest in manifest["files"].items():
        if _sha256(path / name) != digest:
            raise ValueError(f"{name} is not what was written")
    return manifest


def _compare(path: Path, stored: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    changed = [
        f"{name} was {stored.get(name, 'unset')} and is now {wanted.get(name, 'unset')}"
        for name in sorted({*stored, *wanted})
        if stored.get(name) != wanted.get(name)
    ]
    if changed:
        raise HyperparameterError(
            f"The checkpoint {path} belongs to another job: {'; '.join(changed)}. "
            "Set resume=fresh to start over, or go back to the earlier settings."
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
