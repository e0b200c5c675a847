"""Output folders: none may destroy what the job reads; each must be writable and have room."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dreambooth.errors import HyperparameterError, ResourceError
from dreambooth.model_folder.destination import ENTRIES, PARTIAL
from dreambooth.settings.container import Environment
from dreambooth.training.plan import TrainingPlan

_GIB = 2**30


def check(environment: Environment, model: Path | None) -> None:
    """No output folder may lie in the training folder or the model, nor in the model folder to be.

    model: the folder or archive of the pretrained model, None where it comes from a hub. Nothing is
    written. Raises HyperparameterError with a sentence per fault.
    """
    inputs = [("the training folder", environment.training)]
    if model is not None and model.is_dir():
        inputs.append(("the pretrained model", model))
    outputs = {
        "--model_dir": environment.model_dir,
        "--output_data_dir": environment.output_data_dir,
        "--checkpoint_dir": environment.checkpoint_dir,
    }
    faults = []
    for option, folder in outputs.items():
        if folder is None:
            continue
        places = (
            inputs
            if option == "--model_dir"
            else [
                *inputs,
                ("the folder of the trained model (--model_dir)", environment.model_dir),
            ]
        )
        faults += [
            f"{option} {folder} lies in {name} {place}, where nothing else may be written: "
            "choose another folder."
            for name, place in places
            if _lies_in(folder, place)
        ]
    if faults:
        raise HyperparameterError(faults)


def make(environment: Environment) -> None:
    """Make the folders for output data and checkpoints and write into them, before hours are spent.

    Raises ResourceError, naming the option, where one cannot be written.
    """
    for option, folder in (
        ("--output_data_dir", environment.output_data_dir),
        ("--checkpoint_dir", environment.checkpoint_dir),
    ):
        if folder is None:
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ResourceError(
                f"Nothing can be written to {folder} ({error.strerror or error}): "
                f"give another folder with {option}."
            ) from error


def checkpoint_folder(environment: Environment, plan: TrainingPlan) -> Path | None:
    """The folder given for checkpoints; where only an interval is set, one beside the metrics."""
    if environment.checkpoint_dir is not None:
        return environment.checkpoint_dir
    if plan.checkpointing_steps or plan.checkpointing_minutes:
        return environment.output_data_dir / "checkpoints"
    return None


def class_image_folder(environment: Environment) -> Path:
    """Where sampled class images lie: beside the checkpoints, so that a spot job keeps them."""
    return (environment.checkpoint_dir or environment.output_data_dir) / "class_images"


def check_room(environment: Environment, plan: TrainingPlan) -> None:
    """Refuse at once what the disks cannot hold; what is there of an earlier run counts as room.

    Nothing is written. Raises ResourceError with the needs of the disk that is too small.
    """
    checkpoints, budget = checkpoint_folder(environment, plan), plan.disk
    samples = class_image_folder(environment)
    output = environment.output_data_dir
    needs = [
        _Need("the model", environment.model_dir, budget.model, _earlier(environment.model_dir)),
        _Need("class images", samples, budget.class_images, (samples,)),
        _Need("the report", output, budget.rest, (output / "report.html",)),
    ]
    if checkpoints is not None:
        many = f"{budget.checkpoints} checkpoints at a time"
        there = (*checkpoints.glob("step-*"), *checkpoints.glob(PARTIAL + "*"))
        needs.append(_Need(many, checkpoints, budget.all_checkpoints, there))
    by_disk: dict[int, list[_Need]] = {}
    for need in needs:
        with contextlib.suppress(OSError):  # a disk that cannot be asked shows when it is full
            by_disk.setdefault(os.stat(_existing(need.folder)).st_dev, []).append(need)
    for together in by_disk.values():
        _check_disk(together)


def check_room_to_unpack(archive: Path, workspace: Path) -> None:
    """Refuse a tarball that is larger than the disk it would be unpacked on; weights hardly pack.

    Raises ResourceError.
    """
    size, free = archive.stat().st_size, shutil.disk_usage(workspace).free
    if size > free:
        raise ResourceError(
            f"{archive} ({_gib(size)}) cannot be unpacked: the disk of {workspace} has "
            f"{_gib(free)} free. Free some, or let TMPDIR name a folder on a larger disk."
        )


@dataclass(frozen=True, slots=True)
class _Need:
    """Bytes to come into a folder, and what is there of them (it goes, or is used again)."""

    what: str
    folder: Path
    bytes: int
    there: Iterable[Path]


def _check_disk(needs: list[_Need]) -> None:
    folder = _existing(needs[0].folder)
    more = sum(max(0, need.bytes - size(need.there)) for need in needs)
    free = shutil.disk_usage(folder).free
    if more <= free:
        return
    named = ", ".join(f"{need.what} {_gib(need.bytes)}" for need in needs if need.bytes)
    raise ResourceError(
        f"The disk of {folder} has {_gib(free)} free, and this run needs {_gib(more)} more there "
        f"({named}): free some space, lower checkpoints_total_limit, set export_precision=fp16, or "
        "give folders on a larger disk (--model_dir, --output_data_dir, --checkpoint_dir)."
    )


def _earlier(model_dir: Path) -> Iterable[Path]:
    """The earlier model, which is removed before training."""
    return [*(model_dir / name for name in ENTRIES), *model_dir.glob(PARTIAL + "*")]


def size(paths: Iterable[Path]) -> int:
    """Bytes of files, and of folders with all that is in them; what vanishes meanwhile is none."""
    total = 0
    for path in paths:
        inside = [Path(folder, name) for folder, _, names in os.walk(path) for name in names]
        for file in inside or [path]:
            with contextlib.suppress(OSError):
                status = file.stat()
                total += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return total


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = Path(os.path.abspath(folder))
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def _gib(count: int) -> str:
    return f"{count / _GIB:.2f} GiB" if count >= _GIB / 10 else f"{count / 2**20:.1f} MiB"


def _lies_in(folder: Path, place: Path) -> bool:
    real = Path(os.path.realpath(folder))  # unlike Path.resolve, it bears loops of links
    return real.is_relative_to(os.path.realpath(place))
