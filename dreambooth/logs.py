"""What a command says besides its results: our log lines on stderr, without libraries' noise."""

from __future__ import annotations

import logging
import os
import sys

# They remark on what nobody asked for, such as optional packages that are not installed.
_NOISY = (
    *("httpx", "httpcore", "urllib3", "PIL", "bitsandbytes"),
    *("transformers", "diffusers", "accelerate", "huggingface_hub", "kernels"),
)
# These set the level of their loggers anew while they are imported, from variables of their own.
_VERBOSITY = ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY")


def to_stderr(level: str) -> None:
    """Send log lines from `level` on ("debug" .. "critical") to stderr, of libraries errors only.

    On a terminal each line wipes the progress bar that may stand there. May be called again.
    """
    over_the_bar = "\r\033[K" if sys.stderr.isatty() else ""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter(
            over_the_bar + "%(asctime)s %(levelname)s %(where)s%(message)s",
            datefmt="%H:%M:%S",
            defaults={"where": ""},  # a job's phase and step, set by its recorder
        )
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for variable in _VERBOSITY:
        os.environ.setdefault(variable, "error")
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
