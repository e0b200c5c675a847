"""Draw with a state that a run has kept, and make it the run's model.

A state holds the trained parts alone. A whole model folder is made of it and of the run's model
with second names of the same files (hard links), which takes no room; what reads it checks it like
any other model. States are in fp16, as is the one that early stopping takes; a checkpoint's weights
and those of the model that ends a run are kept as they are.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Final, Literal

import torch

from dreambooth.diffusion import model as models
from dreambooth.errors import UserError
from dreambooth.model_folder import (
    destination,
    export,
    headers,
    layout,
    model_card,
    single_file_export,
)
from dreambooth.model_folder.model_card import ModelCard
from dreambooth.process import files, temporary_folder
from dreambooth.runs import run_folder, run_states
from dreambooth.runs.run_folder import Run, RunState

_ELSEWHERE: Final = "keep runs on another disk"
_SINGLE_FILE: Final = "model.safetensors"
_SETTINGS: Final = "hyperparameters.json"
_NOT_ENDED: Final = (RunState.WAITING, RunState.DRAFT)


def keep(run: Run, step: int) -> None:
    """Make the state of a step the run's model; the model that was there stays as a state.

    The new folder is written beside the old one and takes its place in one step: a process that is
    killed leaves the one or the other. Files in it that are not ours stay. Raises UserError where
    the run is running, ModelArtifactError where the state does not fit, and ResourceError.
    """
    with (
        run.changing() as found,
        files.disk_faults_named("The model", run.folder, elsewhere=_ELSEWHERE),
    ):
        if found in _NOT_ENDED:
            raise UserError(f"The run {run.name} is {found}: let it end first.")
        model = _model(run)
        card = model_card.read(model)
        if card.steps == step:
            raise UserError(f"The model of the run {run.name} is that of step {step} already.")
        with temporary_folder.temporary(run.folder) as workspace:
            composed = compose(run, step, workspace / "composed")
            new, file = workspace / run_folder.MODEL, workspace / _SINGLE_FILE
            _write(new, composed, replace(card, steps=step, is_chosen=True))
            _link_others(model, new)
            _set_aside(run, card.steps)
            title = _title_of_single_file(run, card)
            if title is not None:
                single_file_export.export(new, file, title=title)
                (run.folder / _SINGLE_FILE).unlink()  # it never lies beside a model of other steps
            files.exchange(new, model)
            if title is not None:
                files.put_in_place(file, run.folder / _SINGLE_FILE)


def compose(run: Run, step: int, folder: Path) -> Path:
    """Make a model folder of a run's model and the state of a step, and return it.

    folder: a new one on the disk of the run. Raises UserError where there is no such state, or it
    holds other parts than those that were trained; OSError.
    """
    model, state = _model(run), run_states.state_of(run, step)
    if model_card.read(model).train_text_encoder != ("text_encoder" in state.weights):
        raise UserError(
            f"The state of step {step} does not hold the parts that the model says were trained."
        )
    folder.mkdir(parents=True)
    for name in destination.ENTRIES:
        source = model / name
        if name == layout.SAMPLES or not os.path.lexists(source):
            continue
        if source.is_symlink() or not source.is_dir():
            files.link_or_copy(source, folder / name)
            continue
        (folder / name).mkdir()
        taken = source.iterdir() if name not in state.weights else [source / "config.json"]
        for path in taken:
            if path.is_symlink() or not path.is_dir():
                files.link_or_copy(path, folder / name / path.name)
    for part, weights in state.weights.items():
        files.link_or_copy(weights, folder / part / layout.WRITTEN_WEIGHTS[part])
    return folder


def _model(run: Run) -> Path:
    model = run.folder / run_folder.MODEL
    if not run.has_model():
        raise UserError(f"The run {run.name} has no model, of which the other parts are taken.")
    if model.is_symlink() or files.mounts_in(model):
        raise UserError(f"{model} is a link, or something is mounted there: nothing is replaced.")
    if files.is_locked(model):
        raise UserError(f"Another job is writing to {model}: wait until it ends.")
    return model


def _write(new: Path, composed: Path, card: ModelCard) -> None:
    """Write the model as a job writes it: it is loaded, with all checks, and exported."""
    loaded = models.load(composed, device=torch.device("cpu"))
    export.write(
        new,
        base_folder=composed,
        trained=export.TrainedParts(
            unet=loaded.unet, text_encoder=loaded.text_encoder if card.train_text_encoder else None
        ),
        resolution=loaded.resolution,
        card=card,
        hyperparameters_json=json.dumps(layout.read_json(composed / _SETTINGS), indent=2),
        precision=_precision(composed / "vae"),
        elsewhere=_ELSEWHERE,
    )


def _precision(frozen: Path) -> Literal["fp32", "fp16"]:
    """Return the float type of all weights of a model that a run has written."""
    entries = headers.read_header(frozen / layout.WRITTEN_WEIGHTS[frozen.name])
    return "fp16" if any(entry.dtype == "F16" for entry in entries) else "fp32"


def _link_others(model: Path, new: Path) -> None:
    """Take along what lies in a model's folder and is not of the model, such as code/."""
    for path in model.iterdir():
        if path.name in destination.ENTRIES or path.name.startswith(destination.PARTIAL):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new / path.name, symlinks=True, copy_function=files.link_or_copy)
        else:
            files.link_or_copy(path, new / path.name)


def _set_aside(run: Run, step: int) -> None:
    """Keep the weights of the model that is replaced as a state, unless there is one.

    They get second names, so this takes no room before the old folder is removed.
    """
    state = run_states.state_of(run, step)
    if state != run_states.model_state(run):
        return
    states = run.folder / run_folder.CHECKPOINTS / run_folder.STATES
    for folder in (states.parent, states):
        if folder.is_symlink():
            raise UserError(f"{folder} is a link, and nothing is written behind it.")
    final, partial = states / f"step-{step:08}", states / f".partial-step-{step:08}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for part, weights in state.weights.items():
        files.link_or_copy(weights, partial / f"{part}.safetensors")
    shutil.rmtree(final, ignore_errors=True)  # the same in fp16
    files.put_in_place(partial, final)


def _title_of_single_file(run: Run, card: ModelCard) -> str | None:
    """Return the title of the run's model in one file, None where the run has written none."""
    path = run.folder / _SINGLE_FILE
    asked = layout.read_json(run.folder / run_folder.MODEL / _SETTINGS).get("export_single_file")
    if asked != "True" or path.is_symlink() or not path.is_file():
        return None
    title = headers.read_with_metadata(path)[1].get("modelspec.title")
    return title or ", ".join(subject.instance_prompt for subject in card.subjects)
