"""Write the failure file of a job, short enough for SageMaker to show all of it.

SageMaker shows the first 1024 characters of ``<root>/output/failure`` as ``FailureReason``, so the
reason comes first, and long lists of faults are shortened so that each is still named. Source:
AWS, "How Amazon SageMaker AI Processes Training Output". Standard library only.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from dreambooth.errors import DreamBoothError, HyperparameterError, ResourceError, one_line
from dreambooth.process.files import disk_fault, is_disk_full
from dreambooth.process.memory import is_out_of_memory

# SageMaker shows this much of the failure file as FailureReason.
MAX_FAILURE_BYTES: Final = 1024


def for_the_user(error: Exception) -> DreamBoothError | None:
    """Return the error as one that the user can act on, or None if it is a bug of ours.

    A full disk or a lack of memory may surface anywhere, also inside a library.
    """
    if isinstance(error, DreamBoothError):
        return error
    if is_disk_full(error):
        where = getattr(error, "filename", None) or "the disk"
        return disk_fault("A file", where, error, elsewhere="give folders on a larger disk")
    if is_out_of_memory(error):
        return ResourceError(
            "The machine ran out of memory: lower batch_size or resolution, or take a larger one."
        )
    return None


def write_failure(path: Path, error: BaseException) -> bool:
    """Write why the job failed, reason first, in at most 1024 bytes of UTF-8.

    Never raises; returns whether the file was written. The folder of ``path`` is created only if
    its parent (the root) exists, so that a run outside a container leaves no ``/opt/ml`` behind.
    """
    try:
        if not path.parent.parent.is_dir():
            return False
        text = describe_failure(error).encode("utf-8", errors="replace")
        path.parent.mkdir(exist_ok=True)
        # O_NONBLOCK: if the path is a FIFO, do not wait for a reader.
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK | os.O_CLOEXEC
        with open(os.open(path, flags, 0o644), "wb") as file:
            file.write(text)
    except (OSError, ValueError):
        return False
    return True


def describe_failure(error: BaseException, *, max_bytes: int = MAX_FAILURE_BYTES) -> str:
    """Return why the job failed, reason first, on one line of at most ``max_bytes`` of UTF-8.

    Long lists of wrong settings are shortened sentence by sentence, so that each is still named.
    """
    if isinstance(error, HyperparameterError):
        return _describe_faults(error.faults, max_bytes)
    if isinstance(error, DreamBoothError):
        return _cut(str(error) or type(error).__name__, max_bytes)
    name_and_message = "".join(traceback.format_exception_only(type(error), error))
    return _cut(f"InternalError: {name_and_message}", max_bytes)


def _cut(text: str, max_bytes: int) -> str:
    """Return the text on one line, cut between characters to ``max_bytes`` of UTF-8."""
    whole = one_line(" ".join(text.split()), most=len(text) + 1)
    data = whole.encode("utf-8", errors="replace")
    if len(data) <= max_bytes:
        return data.decode()
    mark = "…"
    return data[: max_bytes - len(mark.encode())].decode(errors="ignore") + mark


def _describe_faults(faults: Sequence[str], max_bytes: int) -> str:
    whole = " ".join(str(HyperparameterError(faults)).split())
    if len(whole.encode("utf-8", errors="replace")) <= max_bytes:
        return _cut(whole, max_bytes)
    # Every sentence begins with the setting's name, so its beginning is what must stay.
    overhead = len(str(HyperparameterError([""] * len(faults))).encode())
    share = (max_bytes - overhead) // len(faults)
    shortened = [_cut(fault, max(share, 24)) for fault in faults]
    return _cut(str(HyperparameterError(shortened)), max_bytes)
