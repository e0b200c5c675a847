"""Make a process's temporary folder, after removing those that killed processes left behind.

A killed job or server cannot clean up, and an unpacked model takes gigabytes. Each folder is locked
as long as its process runs, so a folder without a lock belongs to no running one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dreambooth.process import files

_NEW, _LOCKED = "dreambooth-new-", "dreambooth-job-"  # renamed once it is locked


@contextlib.contextmanager
def temporary(root: Path | None = None) -> Iterator[Path]:
    """Yield an empty folder, removed after the block. Raises ResourceError if none can be made.

    root: the folder in which it is made, None for the system's.
    """
    where, elsewhere = "TMPDIR or /tmp", "let TMPDIR name another folder"
    if root is not None:
        where, elsewhere = str(root), "choose another disk"
    with files.disk_faults_named("The temporary folder", where, elsewhere=elsewhere):
        root = root or Path(tempfile.gettempdir())
        _sweep(root)
        new = Path(tempfile.mkdtemp(prefix=_NEW, dir=root))
        lock = os.open(new, os.O_RDONLY | os.O_DIRECTORY)
        with contextlib.suppress(OSError):  # no locks here: other processes remove nothing either
            files.try_lock(lock)
        folder = new.with_name(_LOCKED + new.name.removeprefix(_NEW))
        new.rename(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _sweep(root: Path) -> None:
    for path in root.glob(_LOCKED + "*"):
        with contextlib.suppress(OSError):  # another user's, or just removed by another process
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(lock).st_uid == os.geteuid() and files.try_lock(lock):
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)
