"""Recognise the errors that mean that memory ran out. Standard library only."""

from __future__ import annotations

from typing import Final

# Parts of the messages of CPU allocators and CUDA libraries, in lower case. cuBLAS and cuDNN report
# a workspace that could not be allocated as a handle or an engine that is missing. Where NVML may
# not be asked (a slice of a GPU, in a container), torch fails while it words its own error (issue
# 112377).
_SIGNS: Final = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "status_alloc_failed",
    "cublas_status_not_initialized",
    "cudnn_status_not_initialized",
    "cudnn_status_internal_error_device_allocation_failed",
    "unable to find an engine to execute this computation",
    "unable to find a valid cudnn algorithm to run convolution",
    "nvml_success == r internal assert failed",
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error, or an earlier one in its chain, says that an allocation failed.

    The chain matters because a CUDA-graph capture that runs out of memory fails once more when it
    is ended. It is not followed beyond an error of the device itself, after which nothing can be
    tried again in this process.
    """
    while error is not None:
        classes = {each.__name__ for each in type(error).__mro__}  # torch may not be imported
        if classes & {"MemoryError", "OutOfMemoryError"}:
            return True
        message = str(error).lower()
        if isinstance(error, RuntimeError) and any(sign in message for sign in _SIGNS):
            return True
        if "AcceleratorError" in classes and "capture" not in message:
            return False
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False
