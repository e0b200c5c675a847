"""Check that output folders are writable, have room and overwrite no input; lock them."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dreambooth.errors import HyperparameterError, ResourceError, UserError
from dreambooth.limits import size_in_words
from dreambooth.model_folder.destination import ENTRIES, PARTIAL
from dreambooth.process import files
from dreambooth.runs import run_folder
from dreambooth.settings.container import Environment
from dreambooth.settings.hyperparameters import Hyperparameters
from dreambooth.training.plan import TrainingPlan

log = logging.getLogger(__name__)


def check(environment: Environment, model: Path | None) -> None:
    """Refuse output folders inside the training folder, the pretrained model or the trained one.

    model: the folder or archive of the pretrained model, None where it comes from a hub. Nothing is
    written. Raises HyperparameterError with a sentence per fault.
    """
    inputs = [("the training folder", environment.training)]
    if model is not None and model.is_dir():
        inputs.append(("the pretrained model", model))
    outputs = {
        "model_dir": environment.model_dir,
        "output_data_dir": environment.output_data_dir,
        "checkpoint_dir": environment.checkpoint_dir,
    }
    named, faults = environment.ways_in.named, []
    for option, folder in outputs.items():
        if folder is None:
            continue
        places = (
            inputs
            if option == "model_dir"
            else [
                *inputs,
                (f"the folder of the trained model ({named('model_dir')})", environment.model_dir),
            ]
        )
        faults += [
            f"{named(option)} {folder} lies in {name} {place}, where nothing else may be written: "
            "choose another folder."
            for name, place in places
            if _lies_in(folder, place)
        ]
    if faults:
        raise HyperparameterError(faults)


def make(environment: Environment) -> None:
    """Make the folders for output data and checkpoints, and try writing to them before training.

    Raises ResourceError, which says how to give another one, where one cannot be written.
    """
    for option, folder in (
        ("output_data_dir", environment.output_data_dir),
        ("checkpoint_dir", environment.checkpoint_dir),
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
                f"{environment.ways_in.elsewhere(option)}."
            ) from error


@contextlib.contextmanager
def locked(environment: Environment, hyperparameters: Hyperparameters) -> Iterator[None]:
    """Keep other jobs out of the output folders during the block, by locking the folders.

    What is made here and is still empty in the end is removed. The folder of the failure file is
    locked too, so that others write none there; jobs on one machine may share it. Raises UserError,
    which names the folder that another job holds.
    """
    folders = {
        "model_dir": environment.model_dir,
        "output_data_dir": environment.output_data_dir,
        "checkpoint_dir": checkpoint_folder(environment, hyperparameters),
    }
    held: list[os.stat_result] = []
    with contextlib.ExitStack() as undo:
        for option, folder in folders.items():
            if folder is None:
                continue
            with contextlib.suppress(OSError):  # a fault is named by those who write there
                folder.mkdir(parents=True)
                undo.callback(_remove_if_empty, folder)
            if os.path.isdir(folder) and not _lock(folder, held, undo):
                another = environment.ways_in.another(option)
                raise UserError(
                    f"Another job is writing to {folder}: wait until it ends"
                    f"{another and f', or {another}'}."
                )
        with contextlib.suppress(OSError):
            descriptor = os.open(environment.failure_file.parent, os.O_RDONLY | os.O_DIRECTORY)
            undo.callback(os.close, descriptor)
            files.try_lock(descriptor)
        yield


def _lock(folder: Path, held: list[os.stat_result], undo: contextlib.ExitStack) -> bool:
    """Lock a folder, if it is not among those held; return False if another job holds it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        undo.callback(os.close, descriptor)
        status = os.fstat(descriptor)
        if any(os.path.samestat(status, other) for other in held):
            return True
        held.append(status)
        return files.try_lock(descriptor)
    except OSError as error:
        log.warning(
            "%s cannot be locked (%s): start no other job that writes there",
            folder,
            error.strerror or error,
        )
        return True


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def checkpoint_folder(
    environment: Environment, asked: Hyperparameters | TrainingPlan
) -> Path | None:
    """Return the folder for checkpoints, None where neither a folder nor a checkpoint is asked for.

    Where no folder is given, it lies beside the metrics.
    """
    if environment.checkpoint_dir is not None:
        return environment.checkpoint_dir
    if asked.checkpointing_steps or asked.checkpointing_minutes or asked.keep_last_checkpoint:
        return environment.output_data_dir / "checkpoints"
    return None


def states_folder(environment: Environment, asked: Hyperparameters | TrainingPlan) -> Path:
    """Return the folder for states, beside the checkpoints or else beside the metrics."""
    return (
        checkpoint_folder(environment, asked) or environment.output_data_dir
    ) / run_folder.STATES


def report_unused_checkpoints(environment: Environment, asked: Hyperparameters) -> None:
    """Log a warning where checkpoints of an earlier run lie and this run asks for none."""
    left = environment.output_data_dir / "checkpoints"
    if checkpoint_folder(environment, asked) is None and any(left.glob("step-*")):
        log.warning(
            "%s holds checkpoints of an earlier run, and this run begins at its first step: with "
            "keep_last_checkpoint or checkpointing_steps it goes on from there",
            left,
        )


def class_image_folder(environment: Environment) -> Path:
    """Return the folder for sampled class images.

    It lies in the checkpoint folder, where one is given, so that a spot job keeps them.
    """
    return (environment.checkpoint_dir or environment.output_data_dir) / "class_images"


def single_file(environment: Environment) -> Path:
    """Return the path of the model in one file, for which the hyperparameters may ask."""
    return environment.output_data_dir / "model.safetensors"


def elsewhere_for_class_images(environment: Environment) -> str:
    """Return the clause that says how to have class images sampled into another folder."""
    option = "output_data_dir" if environment.checkpoint_dir is None else "checkpoint_dir"
    return environment.ways_in.elsewhere(option)


def check_room(environment: Environment, plan: TrainingPlan) -> None:
    """Refuse a run whose files do not fit on the disks.

    Files of an earlier run count as free space. Nothing is written. Raises ResourceError, which
    lists what the run needs on the disk that is too small.
    """
    checkpoints, budget = checkpoint_folder(environment, plan), plan.disk
    samples, states = class_image_folder(environment), states_folder(environment, plan)
    output = environment.output_data_dir
    needs = [
        _Need(
            "the model",
            environment.model_dir,
            budget.model,
            _earlier_model_files(environment.model_dir),
        ),
        _Need("class images", samples, budget.class_images, (samples,)),
        _Need("the report", output, budget.rest, (output / "report.html",)),
        _Need("one file of it", output, budget.single_file, (single_file(environment),)),
        _Need("states to choose from", states, budget.states, (states,)),
    ]
    if checkpoints is not None:
        many = f"{budget.checkpoints} checkpoints at a time"
        there = (*checkpoints.glob("step-*"), *checkpoints.glob(PARTIAL + "*"))
        needs.append(_Need(many, checkpoints, budget.all_checkpoints, there))
    by_disk: dict[int, list[_Need]] = {}
    for need in needs:
        with contextlib.suppress(OSError):  # where stat fails, writing will show a full disk
            by_disk.setdefault(os.stat(_existing(need.folder)).st_dev, []).append(need)
    for together in by_disk.values():
        _check_disk(together, _on_larger_disks(environment))


def check_room_to_unpack(archive: Path, workspace: Path) -> None:
    """Refuse a tarball or file larger than the free space to make a folder of it in.

    Weights hardly compress. Raises ResourceError.
    """
    size, free = archive.stat().st_size, shutil.disk_usage(workspace).free
    if size > free:
        raise ResourceError(
            f"{archive} ({size_in_words(size)}) cannot be unpacked: the disk of {workspace} has "
            f"{size_in_words(free)} free. Free some, or let TMPDIR name a folder on a larger disk."
        )


@dataclass(frozen=True, slots=True)
class _Need:
    """Bytes that the run writes into a folder, and the files there that it replaces or reuses."""

    what: str
    folder: Path
    bytes: int
    there: Iterable[Path]


def _on_larger_disks(environment: Environment) -> str:
    """Return the clause that says how to have the output folders on larger disks."""
    options = ("model_dir", "output_data_dir", "checkpoint_dir")
    clauses = dict.fromkeys(environment.ways_in.elsewhere(option) for option in options)
    if len(clauses) == 1:
        return next(iter(clauses))
    named = ", ".join(environment.ways_in.named(option) for option in options)
    return f"give folders on a larger disk ({named})"


def _check_disk(needs: list[_Need], elsewhere: str) -> None:
    folder = _existing(needs[0].folder)
    more = sum(max(0, need.bytes - size(need.there)) for need in needs)
    free = shutil.disk_usage(folder).free
    if more <= free:
        return
    named = ", ".join(f"{need.what} {size_in_words(need.bytes)}" for need in needs if need.bytes)
    raise ResourceError(
        f"The disk of {folder} has {size_in_words(free)} free, and this run needs "
        f"{size_in_words(more)} more there ({named}): free some space, lower "
        f"checkpoints_total_limit, set export_precision=fp16, or {elsewhere}."
    )


def _earlier_model_files(model_dir: Path) -> Iterable[Path]:
    """Return the files of an earlier model, which are removed before training."""
    return [*(model_dir / name for name in ENTRIES), *model_dir.glob(PARTIAL + "*")]


def size(paths: Iterable[Path]) -> int:
    """Return the bytes of files, and of all files in folders; what vanishes meanwhile counts 0."""
    total = 0
    for path in paths:
        inside = [Path(folder, name) for folder, _, names in os.walk(path) for name in names]
        for file in inside or [path]:
            with contextlib.suppress(OSError):
                status = file.stat()
                total += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return total


def _existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    folder = Path(os.path.abspath(folder))
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def _lies_in(folder: Path, place: Path) -> bool:
    real = Path(os.path.realpath(folder))  # unlike Path.resolve, it accepts loops of links
    return real.is_relative_to(os.path.realpath(place))
