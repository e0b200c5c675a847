"""Say which pictures the meter draws, and at how many moments of a run, by counting its work.

Work is counted in rows that pass forward through the U-Net, a backward pass as two, so that no
clock decides. Standard library only: a job prints this before anything heavy is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol

from dreambooth.data.dataset_info import DatasetInfo
from dreambooth.settings.hyperparameters import Hyperparameters

OTHER_CLASSES = ("a photo of a dog", "a photo of a cat")
PLACE = " on a beach"
SERVED_STEPS = 50
PICTURE_ROWS = 2 * SERVED_STEPS  # guided, as the server draws by default


def other_class(prompts: Iterable[str]) -> str:
    """Return the prompt of another class: a dog, or a cat where one of the prompts has a dog."""
    return OTHER_CLASSES[any("dog" in prompt.lower().split() for prompt in prompts)]


def prompts(dataset: DatasetInfo) -> dict[str, str]:
    """Return the prompts of the meter's pictures by the names that their files have.

    These are `subject` and `place` of each subject (of the second one `subject_2`, `place_2`), then
    `class` likewise for each distinct class prompt, and `other_class`.
    """
    found = {}
    for number, subject in enumerate(dataset.subjects):
        found[f"subject{_after_the_first(number)}"] = subject.instance_prompt
        found[f"place{_after_the_first(number)}"] = subject.instance_prompt + PLACE
    classes = dict.fromkeys(each.class_prompt for each in dataset.subjects if each.class_prompt)
    for number, prompt in enumerate(classes):
        found[f"class{_after_the_first(number)}"] = prompt
    return found | {"other_class": other_class(found.values())}


def _after_the_first(number: int) -> str:
    return f"_{number + 1}" if number else ""


class Passes(Protocol):
    """The passes of a step, as a memory plan and a training plan give them."""

    @property
    def gradient_checkpointing(self) -> bool:
        """Return whether the backward pass makes the forward one again."""

    @property
    def frees_gradients(self) -> bool:
        """Return whether each step makes all passes twice."""


def run_rows(hyperparameters: Hyperparameters, *, steps: int, memory_plan: Passes) -> int:
    """Return the work of so many steps in rows; a prediction of the frozen model counts as one."""
    rows = hyperparameters.batch_size * hyperparameters.gradient_accumulation_steps
    passes = 3 + memory_plan.gradient_checkpointing
    with_class = hyperparameters.with_prior_preservation
    step_rows = rows * (1 + with_class) * passes * (1 + memory_plan.frees_gradients)
    if hyperparameters.predicts_the_prior:
        step_rows += rows * (1 + (hyperparameters.training_guidance_scale != 1))
    return steps * step_rows


def share_of_a_moment(
    hyperparameters: Hyperparameters, *, steps: int, prompts: int, memory_plan: Passes
) -> float:
    """Return which share of a run's work one picture of each prompt takes."""
    rows = run_rows(hyperparameters, steps=steps, memory_plan=memory_plan)
    return prompts * PICTURE_ROWS / rows


def moments(
    hyperparameters: Hyperparameters, *, steps: int, prompts: int, memory_plan: Passes
) -> int:
    """Return at how many moments `meter_pictures_share` allows one picture of each prompt.

    With one it is the end, with two the start too, and with more the turns of the readings between.
    """
    if not (hyperparameters.meter and prompts):
        return 0
    rows = run_rows(hyperparameters, steps=steps, memory_plan=memory_plan)
    return math.floor(hyperparameters.meter_pictures_share * rows / (prompts * PICTURE_ROWS))
