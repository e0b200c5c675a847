from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dreambooth.data.dataset_info import DatasetInfo
from dreambooth.errors import ResourceError
from dreambooth.hyperparameters import Hyperparameters
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
    assert out_of_memory.is_meant_by(error) is meant
    wrapped = ResourceError("too large")
    wrapped.__cause__ = error
    assert out_of_memory.is_meant_by(wrapped) is meant


def test_the_advice_names_what_is_left_to_try() -> None:
    def advice(name: str) -> str:
        plan = make(Hyperparameters(memory_plan=name), DATASET, None, CPU)
        return out_of_memory.advice(plan)

    assert "8bit_adamw_in_backward" in advice("8bit_adamw")
    assert advice("8bit_adamw_in_backward").endswith("to 8bit_adamw_stochastic_rounding.")
    assert advice("8bit_adamw_stochastic_rounding").endswith("lower batch_size or resolution.")
