"""Read from Linux what processes use (memory, files, threads) and who their children are."""

from __future__ import annotations

import contextlib
import os
import resource
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """The resources that one process uses at one moment."""

    rss_bytes: int
    files: int
    threads: int


def usage(pid: int) -> Usage:
    """Read what a process uses. Raises OSError if it is gone."""
    fields = dict(
        line.split(":", 1) for line in (PROC / str(pid) / "status").read_text().splitlines()
    )
    return Usage(
        rss_bytes=int(fields["VmRSS"].split()[0]) * 1024,
        files=len(os.listdir(PROC / str(pid) / "fd")),
        threads=int(fields["Threads"]),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A process; started: distinguishes it from a later one of the same number."""

    pid: int
    parent: int
    started: int
    state: str

    @property
    def lives(self) -> bool:
        """Return whether the process still exists and is not a zombie."""
        now = _read(self.pid)
        return now is not None and now.started == self.started and now.state not in "ZX"


def descendants(pid: int) -> list[Process]:
    """Return the children of a process, and theirs."""
    found = [_read(int(entry.name)) for entry in PROC.iterdir() if entry.name.isdecimal()]
    family, grown = {pid}, True
    while grown:
        more = {one.pid for one in found if one is not None and one.parent in family}
        grown = not more <= family
        family |= more
    return [one for one in found if one is not None and one.pid in family - {pid}]


def _read(pid: int) -> Process | None:
    with contextlib.suppress(OSError):
        # The name in brackets may hold anything; only plain fields follow it (proc(5), stat).
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        return Process(pid=pid, state=fields[0], parent=int(fields[1]), started=int(fields[19]))
    return None


def allow_files(count: int) -> int:
    """Raise this process's limit of open files to `count` if allowed; return the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft != unlimited and soft < count:
        soft = count if hard == unlimited else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return count if soft == unlimited else soft
