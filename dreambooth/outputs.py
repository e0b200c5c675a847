"""Output folders: none may destroy what the job reads, and each must be writable."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from dreambooth.container import Environment
from dreambooth.errors import HyperparameterError, ResourceError


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


def _lies_in(folder: Path, place: Path) -> bool:
    real = Path(os.path.realpath(folder))  # unlike Path.resolve, it bears loops of links
    return real.is_relative_to(os.path.realpath(place))
