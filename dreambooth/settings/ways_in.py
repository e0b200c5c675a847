"""Say, for messages, how the user of a job gives its folders: options, settings or channels.

On SageMaker nobody can set an option, and on a command line there are no channels. Standard library
only.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

TRAINING: Final = "training"
MODEL: Final = "model"
_CHANNEL_VARIABLE: Final = "SM_CHANNEL_"
_MOST_CHANNELS: Final = 5

Way = Literal["option", "setting", "platform", "run"]
RUN_DIR: Final = "run_dir"


@dataclass(frozen=True, slots=True, kw_only=True)
class WaysIn:
    """The way in which each folder of a job is given, and the channels that are there.

    ways: by the name of the option, or `model`; what is missing is an option, and `run` means that
    the folder lies in the run's. pipes: the channels in pipe mode, with the epoch in their names.
    """

    ways: Mapping[str, Way] = field(default_factory=dict)
    channels: tuple[str, ...] = ()
    pipes: tuple[str, ...] = ()

    def named(self, option: str) -> str:
        """Return the name under which the user knows an option."""
        if self._way(option) == "run":
            return f"--{RUN_DIR}"
        return f"--{option}" if self._way(option) == "option" else option

    def elsewhere(self, option: str) -> str:
        """Return the clause that says how to have a folder's files written to another place."""
        if self._way(option) == "platform":
            return "mount another disk there or, on SageMaker, raise volume_size"
        return self.another(option)

    def another(self, option: str) -> str:
        """Return the clause that says how to give another folder, "" where nobody can."""
        given = self._way(option) != "platform"
        return f"give another folder {self._with(option)}" if given else ""

    @property
    def training(self) -> str:
        """Return the clause that says how to give the training folder."""
        if self._way("train") == "platform":
            return f"as the channel `{TRAINING}`{self._instead_of(TRAINING)}"
        return self._with("train")

    @property
    def inside(self) -> str:
        """Return the clause that says how to give a folder that lies in the training folder."""
        if self._way("train") == "platform":
            return (
                f"let the S3 path of the channel `{TRAINING}`, or the folder mounted there, end "
                "with that name"
            )
        return f"give that folder {self._with('train')}"

    @property
    def model(self) -> str:
        """Return the clause that says how to give the pretrained model."""
        if self._way(MODEL) == "platform":
            there = self._instead_of(MODEL)
            return f"as the channel `{MODEL}`{there} or in the hyperparameter pretrained_model"
        return "with --pretrained-model"

    def _with(self, option: str) -> str:
        kind = "the hyperparameter " if self._way(option) == "setting" else ""
        return f"with {kind}{self.named(option)}"

    def _way(self, option: str) -> Way:
        return self.ways.get(option, "option")

    def _instead_of(self, channel: str) -> str:
        """Return in brackets what is there where a channel is missing, nothing where it is not."""
        if channel in self.channels:
            return ""
        pipes = [name for name in self.pipes if name.rpartition("_")[0] == channel]
        if pipes:
            return f" (it is a pipe, `{pipes[0]}`: choose the input mode File or FastFile)"
        others = [name for name in self.channels if name not in (TRAINING, MODEL)]
        if not others:
            return ""
        shown = ", ".join(f"`{name}`" for name in others[:_MOST_CHANNELS])
        shown += f" and {len(others) - _MOST_CHANNELS} more" if len(others) > _MOST_CHANNELS else ""
        return f" (this job has {shown}; the name must be `{channel}`)"


def channels_in(
    folder: Path, environ: Mapping[str, str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of the channels, from a folder and from variables, and those of pipes."""
    folders: list[str] = []
    pipes: list[str] = []
    with contextlib.suppress(OSError):  # there are no channels
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.is_dir():
                folders.append(entry.name)
            elif Path(entry.path).is_fifo():
                pipes.append(entry.name)
    known = {name.lower() for name in folders}
    variables = sorted(
        variable.removeprefix(_CHANNEL_VARIABLE).lower()
        for variable, value in environ.items()
        if variable.startswith(_CHANNEL_VARIABLE) and value.strip()
    )
    return (*folders, *(name for name in variables if name not in known)), tuple(pipes)
