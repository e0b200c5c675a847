"""What a command says besides its results: our log lines on stderr, without libraries' noise, and
the metrics of a job on stdout.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast

# They remark on what nobody asked for, such as optional packages that are not installed.
_NOISY = (
    *("httpx", "httpcore", "urllib3", "PIL", "bitsandbytes"),
    *("transformers", "diffusers", "accelerate", "huggingface_hub", "kernels"),
)
# These set the level of their loggers anew while they are imported, from variables of their own.
_VERBOSITY = ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY")


def to_stderr(level: str, *, phase: str | None = None) -> None:
    """Send log lines from `level` on ("debug" .. "critical") to stderr, of libraries errors only.

    phase: what the lines of a job name until its recorder does. On a terminal each line wipes the
    progress bar that may stand there. May be called again.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter(
            _over_the_bar(sys.stderr) + "%(asctime)s %(levelname)s %(where)s%(message)s",
            datefmt="%H:%M:%S",
            defaults={"where": f"[{phase}] " if phase else ""},
        )
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for variable in _VERBOSITY:
        os.environ.setdefault(variable, "error")
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)


def metric(line: str) -> None:
    """Print a line that SageMaker's metric definitions read: bare, at once, whatever the log level.

    A tuner without it has no objective, so it is a result on stdout and no remark.
    """
    print(f"{_over_the_bar(sys.stdout)}{line}\n", end="", flush=True)


def _over_the_bar(stream: TextIO) -> str:
    """What wipes the progress bar that may stand in a terminal's last line."""
    return "\r\033[K" if stream.isatty() else ""


@contextlib.contextmanager
def lasting_streams() -> Iterator[None]:
    """In the block a stdout or stderr that is closed, or lies on a full disk, costs words only."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, _Lasting(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in before:
            try:
                stream.flush()
            except (OSError, ValueError):  # Python's own flush at its exit would change the code
                with contextlib.suppress(OSError, ValueError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Lasting:
    """A text stream whose writes do not fail."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
