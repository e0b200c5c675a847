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

    Hardly anything that an import makes is garbage, and a process keeps it to its end: what the
    first block has imported is left out of all later collections.
    """
    is_hidden = _UNUSED not in sys.modules
    gc.disable()
    if is_hidden:
        sys.modules[_UNUSED] = cast(ModuleType, None)  # to the import system: there is none
    try:
        yield
    finally:
        if is_hidden:
            del sys.modules[_UNUSED]
        gc.enable()
        if not gc.get_freeze_count():
            gc.freeze()
