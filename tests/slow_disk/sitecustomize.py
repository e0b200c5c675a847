"""Makes the disk of a process slow, without root, by slowing down `os.fsync`.

The folder must be on the process's PYTHONPATH. It imitates a disk that writes only when asked to,
each file at SLOW_DISK_BYTES_PER_SECOND. SLOW_DISK_LOG names a file that gets a line per flushed
file with its bytes and its path. SLOW_DISK_STOP_SECONDS, if set, replaces
`dreambooth.process.stop.STOP_SECONDS`, for tests that cannot wait that long.
"""

from __future__ import annotations

import os
import stat
import time

_RATE = float(os.environ["SLOW_DISK_BYTES_PER_SECOND"])
_LOG = os.environ["SLOW_DISK_LOG"]
_STOP_SECONDS = os.environ.get("SLOW_DISK_STOP_SECONDS")
_fsync = os.fsync


def _slow_fsync(file: int) -> None:
    began = time.monotonic()
    _fsync(file)
    facts = os.fstat(file)
    if not stat.S_ISREG(facts.st_mode):
        return
    time.sleep(max(0.0, began + facts.st_size / _RATE - time.monotonic()))
    with open(_LOG, "a", encoding="utf-8") as log:
        print(facts.st_size, os.readlink(f"/proc/self/fd/{file}"), file=log)


os.fsync = _slow_fsync

if _STOP_SECONDS is not None:
    from dreambooth.process import stop

    stop.STOP_SECONDS = float(_STOP_SECONDS)
