"""Out of memory: how it is told from other errors, and how what is unused is given back."""

from __future__ import annotations

import gc

import torch

# What CPU allocators and CUDA libraries say, in lower case.
_SIGNS = ("out of memory", "can't allocate memory", "alloc_failed", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that an allocation failed, on a GPU or on a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(s in str(error).lower() for s in _SIGNS)


def free_caches() -> None:
    """Hand back what allocators keep for later; call it outside of the `except` block.

    An exception holds the tensors of the frames that it passed through.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
