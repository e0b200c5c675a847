"""Chooses which subjects of the base model a run keeps, and in which turns their prompts are held.

A fine-tuned model carries the prompts of its subjects. Training it on another subject makes it
forget the first ones, and the class burns. Here the model as it was, frozen, is the teacher: at the
noisy latents of the new instance images its prediction is the target for the old prompts. Nothing
of the old pictures is needed. Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from dreambooth.data.dataset_info import DatasetInfo
from dreambooth.model_folder.taught_subjects import TaughtSubject
from dreambooth.settings.hyperparameters import Hyperparameters

KEPT_WEIGHT = 1.0
"""Of the kept prompts' loss, beside the instance loss."""


def subjects_to_keep(
    hyperparameters: Hyperparameters, dataset: DatasetInfo, taught: Sequence[TaughtSubject]
) -> tuple[TaughtSubject, ...]:
    """Return the subjects of the base that the run does not teach itself, if it is to keep any."""
    if hyperparameters.keep_subjects == "False":
        return ()
    own = {_read_as(subject.instance_prompt) for subject in dataset.subjects}
    return tuple(each for each in taught if _read_as(each.instance_prompt) not in own)


def prompts_in_turn(kept: Sequence[TaughtSubject], dataset: DatasetInfo) -> tuple[str, ...]:
    """Return the held prompts in the order in which samples take them, again and again.

    Every other one is an instance prompt of a kept subject; the others are the class prompts, the
    old ones and the new, and the empty prompt, from which guidance starts.
    """
    old = [each.instance_prompt for each in kept]
    classes = [
        *(each.class_prompt for each in kept),
        *(each.class_prompt for each in dataset.subjects),
    ]
    beside = [*dict.fromkeys(prompt for prompt in classes if prompt), ""]
    turns = range(math.lcm(len(old), len(beside)) if old else 0)
    return tuple(
        prompt for turn in turns for prompt in (old[turn % len(old)], beside[turn % len(beside)])
    )


def _read_as(prompt: str) -> str:
    return " ".join(prompt.lower().split())
