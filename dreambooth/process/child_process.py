"""What a Python process of ours needs that another one of ours has started."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import dreambooth

_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h

log = logging.getLogger(__name__)


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables with our package on PYTHONPATH, for `python -P`.

    -P leaves out the current folder, where a user's files may have the names of modules.
    """
    root = str(Path(dreambooth.__file__).parents[1])
    others = environ.get("PYTHONPATH", "")
    return {**environ, "PYTHONPATH": os.pathsep.join(path for path in (root, others) if path)}


def die_with_parent(parent: int | None = None) -> None:
    """Ask Linux for SIGKILL when the thread that started this process ends.

    parent: the number of that process; this one ends at once where it is gone already.
    """
    if sys.platform == "linux":
        try:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        except (OSError, AttributeError):
            log.debug("this system's C library knows no prctl")
    if parent is not None and os.getppid() != parent:
        os._exit(1)
