"""List the states of a run from which its model can be chosen. Standard library only.

These are the states that it has kept, its checkpoints and its model. Their files may be a
stranger's: names are checked and no link is followed; whoever reads the weights checks them.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dreambooth.errors import UserError
from dreambooth.runs import run_folder
from dreambooth.runs.run_folder import Run

# What may be trained, and the file that holds it in a model that a run has written.
_PARTS: Final = {
    "unet": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
_NAME: Final = re.compile("step-([0-9]{1,12})")
_MOST: Final = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class StateFiles:
    """The weights of the trained parts after a step: part -> its safetensors file."""

    step: int
    weights: Mapping[str, Path]

    @property
    def stamp(self) -> str:
        """Return a text that changes with the weights: their size and time. Raises OSError."""
        status = os.stat(self.weights["unet"])
        return f"{status.st_size}-{status.st_mtime_ns}"


def states_of(run: Run) -> list[StateFiles]:
    """Return the states of a run in the order of their steps, each step once.

    The model that training has ended with, and a checkpoint, are preferred to a state in fp16.
    """
    checkpoints = run.folder / run_folder.CHECKPOINTS
    found: dict[int, StateFiles] = {}
    for folder in (checkpoints / run_folder.STATES, checkpoints):
        if all(map(_is_folder, (checkpoints, folder))):
            found |= {state.step: state for state in _states_in(folder)}
    model, info = model_state(run), run.model_info()
    if model is not None:
        facts = info.get("training")
        was_taken = isinstance(facts, dict) and (facts.get("is_chosen") or facts.get("ended_early"))
        if not (was_taken and model.step in found):
            found[model.step] = model
    return [found[step] for step in sorted(found)]


def model_state(run: Run) -> StateFiles | None:
    """Return the trained parts of the run's model, None where there is no model of a run."""
    info, model = run.model_info(), run.folder / run_folder.MODEL
    facts = info.get("training")
    has_text = isinstance(facts, dict) and facts.get("train_text_encoder") is True
    trained = ("unet", "text_encoder") if has_text else ("unet",)
    weights = {part: model / part / _PARTS[part] for part in trained}
    is_whole = all(map(_is_folder, (model, *(model / part for part in trained))))
    step = info.get("steps")
    if not (is_whole and type(step) is int and all(map(_is_file, weights.values()))):
        return None
    return StateFiles(step=step, weights=weights)


def state_of(run: Run, step: int) -> StateFiles:
    """Return the state of a step. Raises UserError, which names those that there are."""
    found = {state.step: state for state in states_of(run)}
    if step not in found:
        there = f"those of the steps {', '.join(map(str, found))}" if found else "none"
        raise UserError(f"The run {run.name} has no state of step {step}; it has kept {there}.")
    return found[step]


def _states_in(folder: Path) -> Iterator[StateFiles]:
    for name in sorted(os.listdir(folder))[:_MOST]:
        number = _NAME.fullmatch(name)
        if number is None or not _is_folder(folder / name):
            continue
        files = {part: folder / name / f"{part}.safetensors" for part in _PARTS}
        weights = {part: path for part, path in files.items() if _is_file(path)}
        if "unet" in weights:
            yield StateFiles(step=int(number[1]), weights=weights)


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return False


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False
