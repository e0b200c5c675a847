"""Make the job's temporary folder, after removing those that killed jobs left behind.

A killed job cannot clean up, and an unpacked model takes gigabytes. Each folder is locked as long
as its job runs, so a folder without a lock belongs to no running job.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dreambooth.process import files

_NEW, _JOB = "dreambooth-new-", "dreambooth-job-"  # renamed once it is locked


@contextlib.contextmanager
def temporary() -> Iterator[Path]:
    """Yield an empty folder, removed after the block. Raises ResourceError if none can be made."""
    with files.disk_faults_named(
        "The temporary folder", "TMPDIR or /tmp", elsewhere="let TMPDIR name another folder"
    ):
        root = Path(tempfile.gettempdir())
        _sweep(root)
        new = Path(tempfile.mkdtemp(prefix=_NEW, dir=root))
        lock = os.open(new, os.O_RDONLY | os.O_DIRECTORY)
        with contextlib.suppress(OSError):  # no locks here: other jobs remove nothing either
            files.try_lock(lock)
        folder = new.with_name(_JOB + new.name.removeprefix(_NEW))
        new.rename(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _sweep(root: Path) -> None:
    for path in root.glob(_JOB + "*"):
        with contextlib.suppress(OSError):  # another user's, or another job just removed it
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(lock).st_uid == os.geteuid() and files.try_lock(lock):
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)
