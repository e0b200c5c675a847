"""The state of a training run, and its checkpoints.

A checkpoint is a folder `step-00000400` that holds weights (safetensors), the optimizer (tensors
only) and manifest.json with the SHA-256 of each file. It is written under another name, flushed to
the disk and renamed, so a folder of that name is never half written.
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
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from dreambooth.errors import HyperparameterError, TrainingDivergedError
from dreambooth.process import files
from dreambooth.process.files import fsync
from dreambooth.process.memory import is_out_of_memory
from dreambooth.training import lr_schedulers
from dreambooth.training import optimizer as optimizers
from dreambooth.training.meter import MeterReading
from dreambooth.training.mixed_precision import Precision

log = logging.getLogger(__name__)

FORMAT = 1
PREFIX = "step-"
_PARTIAL = ".partial-"
_OPTIMIZER = "optimizer.pt"
_LENGTH = frozenset(("max_steps", "epochs", "steps"))  # of the identity
_MANIFEST_NAME = "manifest.json"
_LOADING_FAULTS = (*(RuntimeError, ValueError, KeyError, TypeError, AttributeError, OverflowError),)
_MANIFEST_FIELDS: Mapping[str, type] = {
    **{"identity": dict, "environment": dict, "scaler": dict, "files": dict},
    **{"step": int, "skipped_steps": int, "loss_total": float},
}


@dataclass(slots=True, kw_only=True)
class TrainingState:
    """The trained parts, their optimizer and precision, and the counters of a run.

    step: updates done. skipped_steps: fp16 updates that overflowed and were tried again.
    loss_total: the losses of all steps, summed. checkpoint: the last one written or loaded.
    readings: of the meter, those of an earlier part of the run too.
    """

    unet: nn.Module
    text_encoder: nn.Module | None
    optimizer: torch.optim.Optimizer
    precision: Precision
    step: int = 0
    skipped_steps: int = 0
    loss_total: float = 0.0
    checkpoint: Path | None = None
    readings: list[MeterReading] = field(default_factory=list)

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the trained parts as (name of their folder, module)."""
        yield "unet", self.unet
        if self.text_encoder is not None:
            yield "text_encoder", self.text_encoder


def written_bytes(state: TrainingState, checkpoint: Path) -> int:
    """Return the bytes of a checkpoint of `state`; files that others put there do not count."""
    return sum((checkpoint / name).stat().st_size for name in (*_file_names(state), _MANIFEST_NAME))


def folder_name(step: int) -> str:
    """Return the name of the folder that holds the checkpoint of a step."""
    return f"{PREFIX}{step:08d}"


def save(
    state: TrainingState,
    folder: Path,
    *,
    identity: Mapping[str, str],
    keep: int,
    elsewhere: str = "give another folder",
) -> Path:
    """Write a checkpoint of `state` into `folder`, then remove all but the newest `keep`.

    identity: settings, data and model as name -> value; a run resumes only if they are equal, or
    differ in nothing that the steps of the checkpoint depend on.
    elsewhere: how the user chooses another folder, for messages.
    Raises ResourceError if the disk is full, and TrainingDivergedError if a weight is not finite;
    earlier checkpoints then stay as they were.

    Other programs may add and remove files at any time: SageMaker's agent puts a marker
    (`FILE.sagemaker-uploading`, then `FILE.sagemaker-uploaded`) beside every file that it finds.
    """
    began = time.monotonic()
    _refuse_not_finite(state)
    final = folder / folder_name(state.step)
    partial = folder / f"{_PARTIAL}{final.name}"
    try:
        with files.disk_faults_named(
            f"The checkpoint of step {state.step}",
            folder,
            elsewhere=elsewhere,
            smaller="lower checkpoints_total_limit",
        ):
            folder.mkdir(parents=True, exist_ok=True)
            _remove_partial(folder)
            partial.mkdir(exist_ok=True)  # a marker added during the removal keeps the folder
            _write_files(state, partial, identity)
            if final.exists():  # damaged, or from a run that started over
                aside = tempfile.mkdtemp(prefix=f"{partial.name}-", dir=folder)
                final.rename(aside)
            files.put_in_place(partial, final)
    finally:
        _remove_partial(folder)
    state.checkpoint = final
    tidy(state, folder, keep=keep)
    log.info("checkpoint of step %d written in %.1f s", state.step, time.monotonic() - began)
    return final


def tidy(state: TrainingState, folder: Path, *, keep: int) -> None:
    """Remove half-written checkpoints and all but `keep`: the state's own and the newest."""
    _remove_partial(folder)
    others = [path for path in _checkpoints(folder) if path != state.checkpoint]
    for old in others[keep - (state.checkpoint is not None) :]:
        shutil.rmtree(old, ignore_errors=True)


def clear(folder: Path) -> None:
    """Remove all checkpoints, for a run that starts over; other files in the folder stay."""
    _remove_partial(folder)
    for path in _checkpoints(folder):
        shutil.rmtree(path, ignore_errors=True)


def refuse_another_job(folder: Path, *, identity: Mapping[str, str]) -> None:
    """Raise HyperparameterError, as `load_newest` does, if the checkpoint is of another job.

    Only manifests are read.
    """
    for path in _checkpoints(folder):
        try:
            manifest = json.loads(_require_regular_file(path / _MANIFEST_NAME).read_text())
            stored, step = manifest["identity"], manifest["step"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue  # damaged: `load_newest` skips it with a warning
        if isinstance(stored, dict) and isinstance(step, int):
            return _compare(path, stored, identity, step)


def load_newest(state: TrainingState, folder: Path, *, identity: Mapping[str, str]) -> bool:
    """Load the newest undamaged checkpoint into `state`; return False if there is none.

    Damaged checkpoints are skipped with a warning. Raises HyperparameterError, naming what changed,
    if the checkpoint belongs to another job, or if it does not fit the model.
    """
    for path in _checkpoints(folder):
        try:
            manifest = _read_manifest(path, _file_names(state))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            log.warning("checkpoint %s is damaged and skipped: %s", path, error)
            continue
        _compare(path, manifest["identity"], identity, manifest["step"])
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
            if is_out_of_memory(error):  # a smaller memory plan may have room for it
                raise
            # Its checksums are right, so skipping is wrong; parts of it may be loaded already.
            raise HyperparameterError(
                f"The checkpoint {path} does not fit this model ({' '.join(str(error).split())}): "
                "remove it, or set resume=fresh to start over."
            ) from error
        state.step = manifest["step"]
        state.skipped_steps = manifest["skipped_steps"]
        state.loss_total = manifest["loss_total"]
        state.readings = _readings(manifest)
        state.checkpoint = path
        return True
    return False


def environment() -> dict[str, str]:
    """Return what bit-identity depends on besides settings and data, as name -> value."""
    return {
        "torch": torch.__version__,
        "diffusers": metadata.version("diffusers"),
        "transformers": metadata.version("transformers"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
    }


def _checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, newest first."""
    found = [
        path
        for path in folder.glob(f"{PREFIX}*")
        if path.is_dir() and path.name.removeprefix(PREFIX).isdecimal()
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)), reverse=True)


def _write_files(state: TrainingState, folder: Path, identity: Mapping[str, str]) -> None:
    """Write all files of a checkpoint, and flush them to the disk."""
    for name, module in state.modules():
        tensors = {key: value.contiguous() for key, value in module.state_dict().items()}
        save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
    try:
        with (folder / _OPTIMIZER).open("wb") as file:
            torch.save(state.optimizer.state_dict(), file)
    except RuntimeError as error:  # torch.save raises this if the disk is full
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    manifest = {
        "format": FORMAT,
        "step": state.step,
        "skipped_steps": state.skipped_steps,
        "loss_total": state.loss_total,
        "readings": [reading.as_json() for reading in state.readings],
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
    """Return the names of a checkpoint's files, without the manifest."""
    return (*(f"{name}.safetensors" for name, _ in state.modules()), _OPTIMIZER)


def _load_files(state: TrainingState, folder: Path, checked: Set[str]) -> None:
    if not checked >= set(_file_names(state)):
        raise ValueError(f"it holds {sorted(checked)}")
    for name, module in state.modules():
        module.load_state_dict(load_file(folder / f"{name}.safetensors"))
    saved = torch.load(folder / _OPTIMIZER, map_location="cpu", weights_only=True)
    optimizers.load(state.optimizer, saved)


def _remove_partial(folder: Path) -> None:
    """Remove what a killed run was writing."""
    for path in folder.glob(f"{_PARTIAL}{PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)


def _refuse_not_finite(state: TrainingState) -> None:
    """Raise TrainingDivergedError if a weight is not finite, even if its gradient was."""
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
    """Return the manifest of a checkpoint, after checking the files `names` against it.

    Files that it lists beyond `names` are not checked: earlier versions listed the markers of
    SageMaker's agent as well. Raises ValueError if the checkpoint is damaged.
    """
    manifest: dict[str, Any] = json.loads(_require_regular_file(path / _MANIFEST_NAME).read_text())
    if manifest["format"] != FORMAT:
        raise ValueError(f"its format is {manifest['format']}, not {FORMAT}")
    for name, kind in _MANIFEST_FIELDS.items():
        if not isinstance(manifest[name], kind):
            raise ValueError(f"its manifest's {name} is {manifest[name]!r}")
    _readings(manifest)
    for name, digest in manifest["files"].items():
        if Path(name).name != name or (name in names and _sha256(path / name) != digest):
            raise ValueError(f"{name} is not what was written")
    return manifest


def _readings(manifest: Mapping[str, Any]) -> list[MeterReading]:
    """Return the meter's readings, none in a checkpoint of an earlier version.

    Raises ValueError, KeyError, TypeError.
    """
    return [MeterReading.from_json(reading) for reading in manifest.get("readings", ())]


def _compare(path: Path, stored: Mapping[str, str], wanted: Mapping[str, str], step: int) -> None:
    """Raise HyperparameterError unless the wanted run makes the `step` steps of a checkpoint."""
    changed = [
        name
        for name in sorted({*stored, *wanted} - _ignored_settings(stored, wanted, step))
        if stored.get(name) != wanted.get(name)
    ]
    if changed:
        named = "; ".join(
            f"{name} was {stored.get(name, 'unset')} and is now {wanted.get(name, 'unset')}"
            for name in changed
        )
        raise HyperparameterError(
            f"The checkpoint {path} belongs to another job: {named}.{_why(changed, wanted, step)} "
            "Set resume=fresh to start over, or go back to the earlier settings."
        )


def _ignored_settings(stored: Mapping[str, str], wanted: Mapping[str, str], step: int) -> set[str]:
    """Return the settings that may differ in a resumed run.

    With memory_plan=auto, the free memory decides whether AdamW's states have 8 bits. At a learning
    rate that does not depend on it, the length may differ, as long as no step made is too many.
    """
    both = {stored.get("memory_plan"), wanted.get("memory_plan")}
    ignored = {"use_8bit_adam"} if both == {"auto"} else set()
    ignored |= {"prediction_type"} - stored.keys()  # earlier versions did not store it,
    if wanted.get("training_guidance_scale") == "1.0":  # nor this, which they did not have
        ignored |= {"training_guidance_scale"} - stored.keys()
    if wanted.get("masked_loss") == "False":
        ignored |= {"masked_loss"} - stored.keys()
    if wanted.get("kept_subjects") == "none":
        ignored |= {"kept_subjects"} - stored.keys()
    if stored.get("steps") == wanted.get("steps"):
        # However they are asked for; earlier versions did not store the crops.
        ignored |= {"max_steps", "epochs", "cached_crops"}
    if not _rate_depends_on_length(wanted) and step <= int(wanted.get("steps", 0)):
        ignored |= _LENGTH
    return ignored


def _rate_depends_on_length(wanted: Mapping[str, str]) -> bool:
    return lr_schedulers.depends_on_length(
        wanted.get("lr_scheduler", ""),
        warmup_is_given=wanted.get("lr_warmup_steps") != "None",
    )


def _why(changed: Sequence[str], wanted: Mapping[str, str], step: int) -> str:
    """Return a sentence on why a run of another length does not go on, if this is the fault."""
    if not {*changed} <= {*_LENGTH, "cached_crops"}:
        return ""
    if _rate_depends_on_length(wanted):
        return (
            f" With lr_scheduler={wanted.get('lr_scheduler')} the learning rate of each step "
            "depends on how many there are."
        )
    if "cached_crops" in changed:
        return " The random crops of each picture that are drawn from grow with the steps, up to 8."
    return f" It has made {step} steps already."


def _sha256(path: Path) -> str:
    with _require_regular_file(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _require_regular_file(path: Path) -> Path:
    """Return the path; raise ValueError for a pipe or device, whose reading could block."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path.name} is no regular file")
    return path
