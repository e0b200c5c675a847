"""Makes the C library keep the memory that torch frees, instead of mapping it anew at each step.

glibc maps each tensor of 128 KiB or more separately and returns it to the system when it is freed;
the next step's tensor is new memory, zeroed page by page. On a CPU that costs some 5 % of a
training step of the embedded model, and more with larger batches.
"""

from __future__ import annotations

import ctypes

# malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_ON_THE_HEAP = 32 * 2**20  # bytes; the most that glibc accepts
_KEPT_AT_MOST = 512 * 2**20  # free bytes at the heap's end


def keep_freed_memory() -> bool:
    """Allocate tensors of up to 32 MiB on the heap, and keep up to 512 MiB of freed heap.

    Return False, with nothing changed, if the C library is not glibc. Results do not depend on it.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl and macOS have none, Windows has no handle
        return False
    settings = ((_M_MMAP_THRESHOLD, _LARGEST_ON_THE_HEAP), (_M_TRIM_THRESHOLD, _KEPT_AT_MOST))
    return all(mallopt(ctypes.c_int(name), ctypes.c_int(value)) == 1 for name, value in settings)
