"""Which pictures the meter draws, and at how many moments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dreambooth.data.dataset_info import DatasetInfo, SubjectData
from dreambooth.settings.hyperparameters import MEMORY_PLANS, Hyperparameters
from dreambooth.training import disk, expected_memory, meter_budget
from dreambooth.training import plan as plans
from tests.training.test_disk import FULL_SIZE


def dataset(*subjects: tuple[str, str | None]) -> DatasetInfo:
    return DatasetInfo(
        folder=Path("photos"),
        subjects=tuple(
            SubjectData(instance_prompt=prompt, class_prompt=of_class, instance_images=())
            for prompt, of_class in subjects
        ),
    )


def test_the_prompts_of_one_subject() -> None:
    assert meter_budget.prompts(dataset(("a photo of zwx dog", "a photo of dog"))) == {
        "subject": "a photo of zwx dog",
        "place": "a photo of zwx dog on a beach",
        "class": "a photo of dog",
        "other_class": "a photo of a cat",
    }
    without = meter_budget.prompts(dataset(("a photo of zwx", None)))
    assert list(without) == ["subject", "place", "other_class"]
    assert without["other_class"] == "a photo of a dog"


def test_several_subjects_share_the_prompt_of_their_class() -> None:
    found = meter_budget.prompts(
        dataset(("a zwx cat", "a cat"), ("a vorbit chair", "a chair"), ("a riobugger cat", "a cat"))
    )
    assert list(found) == [
        *("subject", "place", "subject_2", "place_2", "subject_3", "place_3"),
        *("class", "class_2", "other_class"),
    ]
    assert (found["place_3"], found["class_2"]) == ("a riobugger cat on a beach", "a chair")


@pytest.mark.parametrize(
    ("steps", "changes", "expected"),
    [
        (888, {}, 0),  # 3 rows a step; four pictures take 400
        (889, {}, 1),
        (889, {"meter_pictures_share": 0.5}, 3),
        (889, {"meter_pictures_share": 0.0}, 0),
        (889, {"meter": False}, 0),
        (445, {"with_prior_preservation": True}, 1),
        (889, {"batch_size": 2, "gradient_accumulation_steps": 2}, 4),
        (889, {"memory_plan": "8bit_adamw_in_backward"}, 2),  # each pass twice, and checkpointing
    ],
)
def test_the_moments_follow_from_the_work_of_the_run(
    make_training: Callable[..., Any], steps: int, changes: dict[str, Any], expected: int
) -> None:
    more = {"num_class_images": 2} if "with_prior_preservation" in changes else {}
    training = make_training(max_steps=steps, **changes, **more)
    plan = replace(training.plan, meter_prompts=4)
    assert plans.meter_moments(plan, training.settings) == expected
    shown = plans.describe(plan, training.settings)
    assert ("meter pictures" in shown) == (expected > 0)
    if expected == 4:
        line = "4 at the start and the end, and where readings turn (at most 2)"
        assert f"  meter pictures   {line}" in shown


def test_the_pictures_are_counted_in_the_plans() -> None:
    counted = {"class_images": 0, "use_8bit_adam": False, "keeps_checkpoints": False}
    budget = disk.expected(Hyperparameters(), FULL_SIZE, **counted, meter_pictures=100)
    assert budget.rest == disk.REST_BYTES + 100 * 2 * 512 * 512

    def phases(steps: int) -> dict[str, int]:
        found = expected_memory.of_phases(
            Hyperparameters(),
            FULL_SIZE,
            mixed_precision="fp16",
            prior_precision="fp16",
            memory_plan=MEMORY_PLANS["8bit_adamw"],
            steps=steps,
            meter_prompts=4,
        )
        return {peak.phase: peak.bytes for peak in found}

    few, one, three = phases(800), phases(1700), phases(2800)
    assert "meter pictures" not in few
    assert one["meter pictures"] == few["sample pictures"]
    assert three["meter pictures"] > one["meter pictures"]  # between steps, beside AdamW's states
