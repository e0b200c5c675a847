"""Import large libraries in less time: torch, diffusers and transformers take seconds."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Final, cast

# diffusers imports it for quantised models, which are refused; our optimizer imports it itself.
_UNUSED: Final = "bitsandbytes"


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Import libraries in the block, without collecting garbage and without bitsandbytes.

    Hardly anything that an import makes is garbage, and a process keeps it to its end: it is left
    out of all later collections.
    """
    if "diffusers" in sys.modules:
        yield
        return
    collects = gc.isenabled()
    gc.disable()
    # To the import system None says that there is no such module.
    hidden = {} if _UNUSED in sys.modules else {_UNUSED: cast(ModuleType, None)}
    sys.modules.update(hidden)
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
        if collects:
            gc.enable()
        gc.freeze()
