"""Free the memory that nothing uses any more."""

from __future__ import annotations

import gc

import torch


def free_caches() -> None:
    """Free the memory that allocators keep for reuse; call it outside of `except` blocks.

    An exception keeps the tensors of the frames in its traceback alive.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
