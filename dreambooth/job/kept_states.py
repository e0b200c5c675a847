"""Keep the trained parts of good states on the disk while training goes on, in fp16.

Each lies in `states/step-00000215/` as safetensors, beside the checkpoints where there are some,
so that they come back with them on another machine. A folder of that name is whole.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dreambooth.process import files
from dreambooth.training import state as states
from dreambooth.training.state import TrainingState

log = logging.getLogger(__name__)

FOLDER = "states"
_PARTIAL = ".partial-"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptStates:
    """The states in `folder`, at most `keep`. elsewhere: how the user chooses another folder."""

    folder: Path
    keep: int
    elsewhere: str

    def save(self, state: TrainingState) -> None:
        """Keep this state, and remove all but the newest `keep`. Raises ResourceError."""
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
            for old in self._there()[: -self.keep]:  # last: a full disk must not cost a good one
                shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def load(self, state: TrainingState, step: int) -> bool:
        """Give the state the weights of an earlier step; return False where they are not there."""
        folder = self.folder / states.folder_name(step)
        if not all((folder / f"{name}.safetensors").is_file() for name, _ in state.modules()):
            return False
        for name, module in state.modules():
            module.load_state_dict(load_file(folder / f"{name}.safetensors"))
        return True

    def clear(self) -> None:
        """Remove all of them."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _there(self) -> list[Path]:
        """Return the folders of whole states, the oldest first."""
        return sorted(path for path in self.folder.glob(f"{states.PREFIX}*") if path.is_dir())


def _dtype(value: torch.Tensor) -> torch.dtype:
    return torch.float16 if value.is_floating_point() else value.dtype
