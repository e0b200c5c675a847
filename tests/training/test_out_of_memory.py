from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dreambooth.data.dataset_info import DatasetInfo
from dreambooth.errors import ResourceError
from dreambooth.settings.hyperparameters import Hyperparameters
from dreambooth.training import out_of_memory
from dreambooth.training.device import CPU
from dreambooth.training.plan import make

DATASET = DatasetInfo(
    folder=Path("pictures"),
    instance_prompt="a photo of riobugger cat",
    class_prompt=None,
    instance_images=(Path("0.png"),),
    class_images=(),
    warnings=(),
)


@pytest.mark.parametrize(
    ("error", "meant"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("CUDA out of memory"), False),
        (ResourceError("the disk is full"), False),
    ],
)
def test_which_errors_mean_it(error: Exception, meant: bool) -> None:
    assert out_of_memory.ran_out(error) is meant
    wrapped = ResourceError("too large")
    wrapped.__cause__ = error
    assert out_of_memory.ran_out(wrapped) is meant


def advice(name: str = "auto", **changes: object) -> str:
    settings = Hyperparameters(memory_plan=name, **changes)  # type: ignore[arg-type]
    return out_of_memory.advice(make(settings, DATASET, None, CPU))


def test_the_advice_names_what_is_left_to_try() -> None:
    assert "8bit_adamw_in_backward" in advice("8bit_adamw")
    assert "fp32_adamw_in_backward" not in advice("8bit_adamw")  # it needs more memory
    assert advice("fp32_adamw_in_backward").endswith(
        "memory_plan to 8bit_adamw or 8bit_adamw_checkpointing or 8bit_adamw_in_backward or "
        "8bit_adamw_stochastic_rounding."
    )
    assert advice("8bit_adamw_in_backward").endswith("to 8bit_adamw_stochastic_rounding.")
    assert advice("8bit_adamw_stochastic_rounding").endswith("lower batch_size or resolution.")


def test_the_advice_names_the_plan_that_ran_where_switches_are_set_by_hand() -> None:
    told = advice(use_8bit_adam=True)
    assert "(memory_plan 8bit_adamw): lower" in told
    assert "memory_plan to 8bit_adamw_checkpointing or" in told
    told = advice(gradient_checkpointing=True)
    assert "(memory_plan fp32_adamw with gradient_checkpointing=True): lower" in told
    assert "memory_plan to 8bit_adamw or 8bit_adamw_checkpointing or" in told
