"""Name one process so that no other one is ever taken for it, and send it signals.

A process id is used again by the system. Together with the time at which the process started,
counted since the machine's start, and with the id of that start it belongs to one process alone.
Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_START_TIME: Final = 19  # of the fields behind the name in /proc/PID/stat (proc_pid_stat(5))


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessIdentity:
    """A process of a machine.

    start_time: in clock ticks since the machine's start, which no clock that is set changes.
    boot_id: of that start. Both are empty where the system does not tell them.
    """

    pid: int
    start_time: str
    boot_id: str
    host: str

    @classmethod
    def of(cls, pid: int) -> ProcessIdentity:
        """Return the identity of a process that runs now on this machine."""
        return cls(
            pid=pid, start_time=_start_time(pid), boot_id=_boot_id(), host=socket.gethostname()
        )

    @classmethod
    def from_json(cls, found: object) -> ProcessIdentity | None:
        """Return the identity that `as_json` wrote, None for anything else."""
        if not isinstance(found, dict):
            return None
        pid = found.get("pid")
        if type(pid) is not int or not 0 < pid < 2**31:  # other numbers name groups of processes
            return None
        texts = [found.get(name) for name in ("start_time", "boot_id", "host")]
        start_time, boot_id, host = (text if isinstance(text, str) else "" for text in texts)
        return cls(pid=pid, start_time=start_time, boot_id=boot_id, host=host)

    def as_json(self) -> dict[str, object]:
        """Return what `from_json` reads."""
        return asdict(self)

    @property
    def is_running(self) -> bool:
        """Return whether this very process runs, or waits to be buried, on this machine."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # it is another user's
            pass
        return self._is_now()

    def send(self, number: signal.Signals) -> bool:
        """Send a signal to this very process; return False if it does not run on this machine.

        Raises PermissionError for a process of another user.
        """
        try:
            if not hasattr(os, "pidfd_open"):
                if self._is_now():
                    os.kill(self.pid, number)
                    return True
                return False
            handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return False
        try:  # the handle stays with its process, also if the id is used again
            if not self._is_now():
                return False
            signal.pidfd_send_signal(handle, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(handle)
        return True

    def _is_now(self) -> bool:
        return (self.start_time, self.boot_id) == (_start_time(self.pid), _boot_id())


def _start_time(pid: int) -> str:
    with contextlib.suppress(OSError, IndexError):
        # The name stands in brackets and may hold blanks and brackets.
        return (
            Path(f"/proc/{pid}/stat")
            .read_text("utf-8", "replace")
            .rpartition(")")[2]
            .split()[_START_TIME]
        )
    return ""


def _boot_id() -> str:
    with contextlib.suppress(OSError):
        return _BOOT_ID.read_text().strip()
    return ""
