"""Recognises out-of-memory errors, and frees memory that nothing uses."""

from __future__ import annotations

import gc

import torch

# Parts of the messages of CPU allocators and CUDA libraries, in lower case.
_SIGNS = ("out of memory", "can't allocate memory", "alloc_failed", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that an allocation failed, on a GPU or on a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(s in str(error).lower() for s in _SIGNS)


def free_caches() -> None:
    """Free the memory that allocators keep for reuse; call it outside of `except` blocks.

    An exception keeps the tensors of the frames in its traceback alive.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
