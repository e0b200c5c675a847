from __future__ import annotations

import pytest
import torch

from dreambooth.errors import ResourceError
from dreambooth.process.memory import is_out_of_memory


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("x"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (torch.AcceleratorError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling cublasCreate"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"), True),
        (RuntimeError("GET was unable to find an engine to execute this computation"), True),
        (
            RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"),
            True,
        ),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"), True),
        (RuntimeError('NVML_SUCCESS == r INTERNAL ASSERT FAILED at "CUDACachingAllocator"'), True),
        (RuntimeError("shapes do not match"), False),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), False),
        (ValueError("CUDA out of memory"), False),
        (ResourceError("the disk is full"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
    wrapped = ResourceError("too large")
    wrapped.__cause__ = error
    assert is_out_of_memory(wrapped) is expected


def test_the_allocator_of_the_cpu_is_understood() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)


def test_a_capture_that_failed_for_memory_counts_and_a_device_lost_meanwhile_does_not() -> None:
    ended = torch.AcceleratorError("operation failed due to a previous error during capture")
    lost = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    for error in (ended, lost):
        error.__context__ = torch.OutOfMemoryError("CUDA out of memory")
    assert is_out_of_memory(ended)
    assert not is_out_of_memory(lost)


def test_a_context_that_was_suppressed_does_not_count() -> None:
    error = RuntimeError("another fault")
    error.__context__ = MemoryError()
    assert is_out_of_memory(error)
    error.__suppress_context__ = True
    assert not is_out_of_memory(error)
