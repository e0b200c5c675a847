"""Free the memory that nothing uses any more."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def free_caches() -> None:
    """Free the memory that allocators keep for reuse; call it outside of `except` blocks.

    An exception keeps the tensors of the frames in its traceback alive.
    """
    gc.collect()
    if torch.cuda.is_available():
        with refusals_ignored():
            torch.cuda.empty_cache()


@contextmanager
def refusals_ignored() -> Iterator[None]:
    """Let torch's caches stay where it refuses to empty them.

    Before 2.12 it does so after a capture of a CUDA graph that failed (pull request 180395).
    """
    try:
        yield
    except RuntimeError as error:
        if "captures_underway" not in str(error):
            raise
