"""Free the memory that nothing uses any more."""

from __future__ import annotations

import gc

import torch


def free_caches() -> None:
    """Free the memory that allocators keep for reuse; call it outside of `except` blocks.

    An exception keeps the tensors of the frames in its traceback alive. After a capture of a CUDA
    graph that failed, torch before 2.12 may refuse (pull request 180395): its caches then stay.
    """
    gc.collect()
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.empty_cache()
    except RuntimeError as error:
        if "captures_underway" not in str(error):
            raise
