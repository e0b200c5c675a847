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
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from dreambooth.errors import HyperparameterError, ResourceError, TrainingDivergedError
from dreambooth.process.files import fsync
from dreambooth.training import optimizer as optimizers
from dreambooth.training.mixed_precision import Precision

log = logging.getLogger(__name__)

FORMAT = 1
PREFIX = "step-"
_PARTIAL = ".partial-"
_OPTIMIZER = "optimizer.pt"
_MANIFEST_NAME = "manifest.json"
_LOADING_FAULTS = (*(RuntimeError, ValueError, KeyError, TypeError, AttributeError, OverflowError),)
_MANIFEST_FIELDS: Mapping[str, type] = {
    **{"identity": dict, "environment": dict, "scaler": dict, "files": dict},
    **{"step": int, "skipped_steps": int, "loss_total": float},
}


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


def written_bytes(state: TrainingState, checkpoint: Path) -> int:
    """The size of a checkpoint of `state`: of our own files alone."""
    return sum((checkpoint / name).stat().st_size for name in (*_file_names(state), _MANIFEST_NAME))


def folder_name(step: int) -> str:
    """The name of the folder that holds the checkpoint of a step."""
    return f"{PREFIX}{step:08d}"


def save(state: TrainingState, folder: Path, *, identity: Mapping[str, str], keep: int) -> Path:
    """Write a checkpoint of `state` into `folder` and drop the oldest ones but `keep`.

    identity: what must be equal for a resumed run to go on (settings, data, model), name -> value.
    Raises ResourceError where the disk is full and TrainingDivergedError where a weight is not
    finite, leaving earlier checkpoints as they were.

    Files of others may come and go beside ours at any time: SageMaker's agent puts a marker
    (`FILE.sagemaker-uploading`, then `FILE.sagemaker-uploaded`) beside every file that it finds.
    """
    began = time.monotonic()
    _refuse_not_finite(state)
    final = folder / folder_name(state.step)
    partial = folder / f"{_PARTIAL}{final.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_partial(folder)
        partial.mkdir(exist_ok=True)  # a marker may have come into it while it was removed
        _write_files(state, partial, identity)
        if final.exists():  # damaged, or of a run that started over
            aside = tempfile.mkdtemp(prefix=f"{partial.name}-", dir=folder)
            final.rename(aside)
        partial.rename(final)
        fsync(folder)
    except (OSError, SafetensorError) as error:
        raise ResourceError(
            f"The checkpoint of step {state.step} cannot be written to {folder}: "
            f"{getattr(error, 'strerror', None) or error}. Free some disk, lower "
            "checkpoints_total_limit, or give another --checkpoint_dir."
        ) from error
    finally:
        _remove_partial(folder)
    state.checkpoint = final
    tidy(state, folder, keep=keep)
    log.info("checkpoint of step %d written in %.1f s", state.step, time.monotonic() - began)
    return final


def tidy(state: TrainingState, folder: Path, *, keep: int) -> None:
    """Remove half-written checkpoints and the oldest ones but `keep`, never the state's own."""
    _remove_partial(folder)
    others = [path for path in _checkpoints(folder) if path != state.checkpoint]
    for old in others[keep - (state.checkpoint is not None) :]:
        shutil.rmtree(old, ignore_errors=True)


def clear(folder: Path) -> None:
    """Remove all checkpoints, for a run that starts over; anything else in the folder stays."""
    _remove_partial(folder)
    for path in _checkpoints(folder):
        shutil.rmtree(path, ignore_errors=True)


def refuse_another_job(folder: Path, *, identity: Mapping[str, str]) -> None:
    """Raise what `load_newest` would on a changed job; only the manifest is read."""
    for path in _checkpoints(folder):
        try:
            stored = json.loads(_regular(path / _MANIFEST_NAME).read_text())["identity"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue  # damaged: told when it is skipped
        if isinstance(stored, dict):
            return _compare(path, stored, identity)


def load_newest(state: TrainingState, folder: Path, *, identity: Mapping[str, str]) -> bool:
    """Bring `state` to the newest whole checkpoint; False where there is none.

    Damaged checkpoints are skipped with a warning. Raises HyperparameterError, naming what changed,
    where the checkpoint belongs to another job.
    """
    for path in _checkpoints(folder):
        try:
            manifest = _read_manifest(path, _file_names(state))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
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
        try:
            _load_files(state, path, manifest["files"].keys())
            state.precision.scaler.load_state_dict(manifest["scaler"])
        except (*_LOADING_FAULTS, SafetensorError) as error:
            # Its checksums are right, so it was made so: parts of it may be loaded by now.
            raise HyperparameterError(
                f"The checkpoint {path} does not fit this model ({' '.join(str(error).split())}): "
                "remove it, or set resume=fresh to start over."
            ) from error
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
        "diffusers": metadata.version("diffusers"),
        "transformers": metadata.version("transformers"),
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


def _write_files(state: TrainingState, folder: Path, identity: Mapping[str, str]) -> None:
    """Everything that a checkpoint holds, flushed to the disk."""
    for name, module in state.modules():
        tensors = {key: value.contiguous() for key, value in module.state_dict().items()}
        save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
    try:
        with (folder / _OPTIMIZER).open("wb") as file:
            torch.save(state.optimizer.state_dict(), file)
    except RuntimeError as error:  # what torch.save makes of a full disk
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    manifest = {
        "format": FORMAT,
        "step": state.step,
        "skipped_steps": state.skipped_steps,
        "loss_total": state.loss_total,
        "scaler": state.precision.scaler.state_dict(),
        "identity": dict(identity),
        "environment": environment(),
        "files": {name: _sha256(folder / name) for name in _file_names(state)},
    }
    (folder / _MANIFEST_NAME).write_text(json.dumps(manifest, indent=2))
    for name in (*_file_names(state), _MANIFEST_NAME):
        fsync(folder / name)
    fsync(folder)


def _file_names(state: TrainingState) -> tuple[str, ...]:
    """The files of a checkpoint beside its manifest; any other file in its folder is not ours."""
    return (*(f"{name}.safetensors" for name, _ in state.modules()), _OPTIMIZER)


def _load_files(state: TrainingState, folder: Path, checked: Set[str]) -> None:
    if not checked >= set(_file_names(state)):
        raise ValueError(f"it holds {sorted(checked)}")
    for name, module in state.modules():
        module.load_state_dict(load_file(folder / f"{name}.safetensors"))
    saved = torch.load(folder / _OPTIMIZER, map_location="cpu", weights_only=True)
    optimizers.load(state.optimizer, saved)


def _remove_partial(folder: Path) -> None:
    """What a killed run was writing."""
    for path in folder.glob(f"{_PARTIAL}{PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)


def _refuse_not_finite(state: TrainingState) -> None:
    """A step whose gradient was finite may still have thrown a weight out of range."""
    for name, module in state.modules():
        for key, value in module.state_dict().items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                kept = f" The last good checkpoint is {state.checkpoint}." * bool(state.checkpoint)
                raise TrainingDivergedError(
                    f"{key} of the {name} is not finite after step {state.step}: training has "
                    f"diverged. Lower learning_rate.{kept}",
                    step=state.step,
                )


def _read_manifest(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are as it says. Raises ValueError otherwise.

    names: the files that count. Earlier versions listed the markers of SageMaker's agent as well.
    """
    manifest: dict[str, Any] = json.loads(_regular(path / _MANIFEST_NAME).read_text())
    if manifest["format"] != FORMAT:
        raise ValueError(f"its format is {manifest['format']}, not {FORMAT}")
    for name, kind in _MANIFEST_FIELDS.items():
        if not isinstance(manifest[name], kind):
            raise ValueError(f"its manifest's {name} is {manifest[name]!r}")
    for name, digest in manifest["files"].items():
        if Path(name).name != name or (name in names and _sha256(path / name) != digest):
            raise ValueError(f"{name} is not what was written")
    return manifest


def _compare(path: Path, stored: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    changed = [
        f"{name} was {stored.get(name, 'unset')} and is now {wanted.get(name, 'unset')}"
        for name in sorted({*stored, *wanted} - _may_differ(stored, wanted))
        if stored.get(name) != wanted.get(name)
    ]
    if changed:
        raise HyperparameterError(
            f"The checkpoint {path} belongs to another job: {'; '.join(changed)}. "
            "Set resume=fresh to start over, or go back to the earlier settings."
        )


def _may_differ(stored: Mapping[str, str], wanted: Mapping[str, str]) -> set[str]:
    """The width of AdamW's states, where the memory plan is chosen by the memory that is free."""
    both = {stored.get("memory_plan"), wanted.get("memory_plan")}
    return {"use_8bit_adam"} if both == {"auto"} else set()


def _sha256(path: Path) -> str:
    with _regular(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _regular(path: Path) -> Path:
    """Return a path that is no pipe or device, which would be waited for. Raises ValueError."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path.name} is no regular file")
    return path
