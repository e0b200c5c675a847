from __future__ import annotations

from pathlib import Path

from dreambooth.data.dataset_info import DatasetInfo, SubjectData
from dreambooth.settings.hyperparameters import Hyperparameters
from dreambooth.training.device import CPU
from dreambooth.training.plan import make, out_of_memory_advice

DATASET = DatasetInfo(
    folder=Path("pictures"),
    subjects=(
        SubjectData(
            instance_prompt="a photo of riobugger cat",
            class_prompt=None,
            instance_images=(Path("0.png"),),
        ),
    ),
)


def advice(name: str = "auto", **changes: object) -> str:
    settings = Hyperparameters(memory_plan=name, **changes)  # type: ignore[arg-type]
    return out_of_memory_advice(make(settings, DATASET, None, CPU))


def test_the_advice_names_what_is_left_to_try() -> None:
    assert "8bit_adamw_in_backward" in advice("8bit_adamw")
    assert "fp32_adamw_in_backward" not in advice("8bit_adamw")  # it needs more memory
    assert advice("fp32_adamw_in_backward").endswith(
        "memory_plan to 8bit_adamw or 8bit_adamw_checkpointing or 8bit_adamw_in_backward."
    )
    assert advice("8bit_adamw_in_backward").endswith("lower batch_size or resolution.")


def test_the_advice_names_the_plan_that_ran_where_switches_are_set_by_hand() -> None:
    told = advice(use_8bit_adam=True)
    assert "(memory_plan 8bit_adamw): lower" in told
    assert "memory_plan to 8bit_adamw_checkpointing or" in told
    told = advice(gradient_checkpointing=True)
    assert "(memory_plan fp32_adamw with gradient_checkpointing=True): lower" in told
    assert "memory_plan to 8bit_adamw or 8bit_adamw_checkpointing or" in told
