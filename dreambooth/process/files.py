"""Write files whole or not at all, say why the disk did not take them, and lock folders."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from dreambooth.errors import ResourceError

_LOOK_S = 0.01
_MOUNTS = Path("/proc/self/mountinfo")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_LINKS = (errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOTSUP)
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
_NO_FOLDER = (errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.ELOOP, errno.ENAMETOOLONG)


def fsync(path: Path) -> None:
    """Flush a file's content, or a folder's list of names, to the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def try_lock(descriptor: int, *, shared: bool = False, patience_s: float = 0.0) -> bool:
    """Lock an open file or folder; return False if another process holds the lock.

    shared: several may hold it at once, as those who only look do. patience_s: how long to wait for
    others. The system undoes the lock once the descriptor is closed, however the process ends.
    Raises OSError where the file system has no locks.
    """
    deadline = time.monotonic() + patience_s
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_LOOK_S)
        else:
            return True


def is_locked(folder: Path) -> bool:
    """Return whether any process holds the lock of a folder; False where that is unknown."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            return not try_lock(descriptor, shared=True)
        finally:
            os.close(descriptor)
    return False


def mounts_in(folder: Path) -> list[Path]:
    """Return where something is mounted in a folder or on it; none where Linux does not tell."""
    with contextlib.suppress(OSError):
        places = [line.split()[4] for line in _MOUNTS.read_bytes().splitlines()]
        # A blank is written as \040.
        names = [re.sub(rb"\\([0-7]{3})", lambda word: bytes([int(word[1], 8)]), p) for p in places]
        whole = folder.resolve()
        mounted = (Path(os.fsdecode(name)) for name in names)
        return [place for place in mounted if place.is_relative_to(whole)]
    return []


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside its place, then rename it: a killed process leaves no half of it.

    Raises OSError, with nothing left behind.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(content)
        put_in_place(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def put_in_place(part: Path, path: Path) -> None:
    """Flush a file or folder to the disk, rename it to `path` and flush that name too."""
    fsync(part)
    os.replace(part, path)
    fsync(path.parent)


def exchange(one: Path, other: Path) -> None:
    """Let two folders change places in one step, so that a killed process leaves no half of it.

    Raises OSError, also where the file system cannot do this (some network disks).
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(one), None, str(other))
    names = (os.fsencode(path) for path in (one, other))
    first, second = (ctypes.c_char_p(name) for name in names)
    if rename(_HERE, first, _HERE, second, _EXCHANGE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(one), None, str(other))
    for folder in {one.parent, other.parent}:
        fsync(folder)


def link_or_copy(source: Path | str, target: Path | str) -> None:
    """Give a file a second name, or copy it where the file system has no such links.

    A symbolic link stays what it is. Raises OSError.
    """
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copyfile(source, target, follow_symlinks=False)


def is_disk_full(error: Exception) -> bool:
    """Return whether an error says that a disk is full, a quota used up or a file too large."""
    return _number(error) in _FULL


@contextlib.contextmanager
def disk_faults_named(
    what: str, where: Path | str, *, elsewhere: str, smaller: str = ""
) -> Iterator[None]:
    """Turn a disk's errors in the block into the ResourceError of `disk_fault`."""
    try:
        yield
    except Exception as error:  # safetensors' own class is known by its name, without an import
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        raise disk_fault(what, where, error, elsewhere=elsewhere, smaller=smaller) from error


def disk_fault(
    what: str, where: Path | str, error: Exception, *, elsewhere: str, smaller: str = ""
) -> ResourceError:
    """Return an error that says what could not be written, where, why, and what to do.

    elsewhere, smaller: clauses on how to write to another place, and how to write less.
    """
    number = _number(error)
    advice = elsewhere
    if number in _FULL:
        reason = "the disk is full"
        advice = ", ".join(["free some space there", *filter(None, [smaller]), f"or {elsewhere}"])
    elif number in _FORBIDDEN:
        reason = "it is not writable"
    elif number in _NO_FOLDER:
        reason = "it is not a folder, and none can be made there"
    else:
        reason = "the disk is at fault"
    return ResourceError(f"{what} cannot be written to {where}: {reason} ({error}); {advice}.")


def _number(error: Exception) -> int | None:
    """Return the errno of an error; safetensors gives it in its message."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None
