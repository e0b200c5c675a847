"""Keep the trained parts of states on the disk while training goes on, in fp16.

Each lies in `states/step-00000215/` as safetensors, beside the checkpoints where there are some,
so that they come back with them on another machine. A folder of that name is whole.

The newest two are always kept, since early stopping takes the last good one, also after a restart.
Of the others, which a user may choose from, those stay that lie most evenly over the run.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dreambooth.process import files
from dreambooth.training import state as states
from dreambooth.training.state import TrainingState

log = logging.getLogger(__name__)

_PARTIAL = ".partial-"
_NEWEST = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptStates:
    """The states in `folder`, at most `keep`. elsewhere: how the user chooses another folder."""

    folder: Path
    keep: int
    elsewhere: str

    def save(self, state: TrainingState) -> None:
        """Keep this state, and remove those that are too many. Raises ResourceError."""
        final = self.folder / states.folder_name(state.step)
        partial = self.folder / f"{_PARTIAL}{final.name}"
        try:
            with files.disk_faults_named("A state", self.folder, elsewhere=self.elsewhere):
                shutil.rmtree(partial, ignore_errors=True)
                shutil.rmtree(final, ignore_errors=True)
                partial.mkdir(parents=True)
                for name, module in state.modules():
                    tensors = {
                        key: value.detach().to("cpu", _dtype(value)).contiguous()
                        for key, value in module.state_dict().items()
                    }
                    save_file(tensors, partial / f"{name}.safetensors", metadata={"format": "pt"})
                    files.fsync(partial / f"{name}.safetensors")
                files.put_in_place(partial, final)
            there = {_step(path): path for path in _there(self.folder)}
            for step in too_many(sorted(there), self.keep):  # last: a full disk must not cost one
                shutil.rmtree(there[step], ignore_errors=True)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def load(self, state: TrainingState, step: int) -> bool:
        """Give the state the weights of an earlier step; return False where they are not there."""
        folder = self.folder / states.folder_name(step)
        found = {}
        for name, module in state.modules():
            path = folder / f"{name}.safetensors"
            found[name] = load_file(path) if path.is_file() else {}
            if found[name].keys() != module.state_dict().keys():
                return False
        for name, module in state.modules():
            module.load_state_dict(found[name])
        return True


def too_many(steps: Sequence[int], keep: int) -> list[int]:
    """Return which of the steps go so that `keep` of them stay.

    steps: in ascending order. Again and again that one goes whose neighbours are nearest to each
    other, but none of the newest two.
    """
    left, gone = [*steps], []
    while len(left) > keep:
        between = range(len(left) - min(_NEWEST, keep))
        nearest = min(between, key=lambda i: left[i + 1] - (left[i - 1] if i else 0))
        gone.append(left.pop(nearest))
    return gone


def remove(folder: Path, *, after: int = -1) -> None:
    """Remove the states of all steps, or of those after one, where a training begins anew."""
    for path in _there(folder):
        if _step(path) > after:
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(f"{_PARTIAL}{states.PREFIX}*"):  # of a process that was killed
        shutil.rmtree(path, ignore_errors=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _there(folder: Path) -> list[Path]:
    """Return the folders of whole states."""
    found = folder.glob(f"{states.PREFIX}*")
    return [
        path
        for path in found
        if path.name.removeprefix(states.PREFIX).isdecimal() and path.is_dir()
    ]


def _step(path: Path) -> int:
    return int(path.name.removeprefix(states.PREFIX))


def _dtype(value: torch.Tensor) -> torch.dtype:
    return torch.float16 if value.is_floating_point() else value.dtype
