"""Unpacks tarballs safely: only regular files and folders, and only into the destination.

On common Python versions nested links can make ``tarfile.extractall`` write outside its
destination, even with ``filter="data"``. Here links, devices and sparse files are refused and names
are checked piece by piece; `tar_stream` reads the archive and caps size, number of members and
compression ratio. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import unicodedata
from collections.abc import Collection
from pathlib import Path
from typing import Final

from dreambooth.errors import ModelArtifactError, ResourceError, quoted
from dreambooth.limits import LIMITS, Limits
from dreambooth.model_folder.tar_stream import Member, Tar
from dreambooth.process import files

_MAX_NAME_PART_BYTES: Final = 255  # of a file name on ext4, XFS and overlayfs


def extract(archive: Path, destination: Path, *, limits: Limits = LIMITS) -> None:
    """Unpack a ``.tar.gz`` or ``.tar`` into an empty or new folder.

    Files are made with mode 0644 and folders with 0755 (less the umask), whatever the archive says.
    On any error everything that was written is removed again. Raises ModelArtifactError for a
    damaged or unsafe archive, naming it and the member, and for a folder that is not empty, and
    ResourceError where the destination cannot be written.
    """
    made = not destination.exists()
    try:
        destination.mkdir(parents=True, exist_ok=True)
        if any(destination.iterdir()):
            raise ModelArtifactError(f"The folder {destination} to unpack into is not empty.")
    except OSError as error:
        raise ResourceError(f"Cannot unpack into {destination}: {error.strerror}.") from error
    try:
        _extract(archive, destination, limits)
    except BaseException:
        with contextlib.suppress(OSError):
            _empty(destination)
            if made:
                destination.rmdir()
        raise


def member_names(
    archive: Path,
    *,
    limits: Limits = LIMITS,
    top_level_only: bool = False,
    stop_at: Collection[str] = (),
) -> list[str]:
    """Return the names of the regular files in an archive, in its order, as ``a/b``, not ``./a/b``.

    With ``top_level_only``, files in folders are left out. Reading ends as soon as one of
    ``stop_at`` has been listed (a compressed archive must be read up to there). Members that
    `extract` would refuse are not listed. Raises ModelArtifactError for a damaged archive.
    """
    names: list[str] = []
    with Tar(archive, limits) as tar:
        for member in tar.members():
            name = _listed_name(member, limits)
            if name is None or (top_level_only and "/" in name):
                continue
            names.append(name)
            if name in stop_at:
                break
    return names


def _extract(archive: Path, destination: Path, limits: Limits) -> None:
    names = _Names(archive, limits)
    with Tar(archive, limits) as tar:
        for member in tar.members():
            if member.refused_kind is not None:
                raise ModelArtifactError(
                    f"{archive}: {quoted(member.name)} is {member.refused_kind}; only regular "
                    "files and folders are unpacked."
                )
            parts = names.add(member)
            with files.disk_faults_named(
                f"{quoted(member.name)} of {archive}", destination, elsewhere="use a larger volume"
            ):
                _write(tar, destination, parts, member.is_folder)
        tar.finish()
    if not names.files:
        raise ModelArtifactError(f"{archive} holds no files.")


def _write(tar: Tar, destination: Path, parts: tuple[str, ...], is_folder: bool) -> None:
    """Make one folder or file; ``parts`` has been checked, and the destination has no links."""
    folder = destination
    for part in parts if is_folder else parts[:-1]:
        folder = folder / part
        folder.mkdir(mode=0o755, exist_ok=True)
    if is_folder:
        return
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(folder / parts[-1], flags, 0o644), "wb") as file:
        for chunk in tar.content():
            file.write(chunk)


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


# Names


class _Names:
    """The names read so far; no two may mean the same file on any common file system."""

    def __init__(self, archive: Path, limits: Limits) -> None:
        self.files = 0
        self._archive = archive
        self._limits = limits
        # Folded name -> (name as spelled, whether it is a folder).
        self._seen: dict[str, tuple[str, bool]] = {}

    def add(self, member: Member) -> tuple[str, ...]:
        """Check a member's name and return its parts; the archive's root has none."""
        fault = _name_fault(member.name, self._limits)
        if fault is not None:
            raise ModelArtifactError(f"{self._archive}: {quoted(member.name)} {fault}.")
        parts = _parts(member.name)
        if not parts and not member.is_folder:
            raise ModelArtifactError(f"{self._archive}: a file without a name.")
        for depth in range(1, len(parts) + 1):
            self._register("/".join(parts[:depth]), depth < len(parts) or member.is_folder)
        self.files += not member.is_folder
        return parts

    def _register(self, name: str, is_folder: bool) -> None:
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
        new = folded not in self._seen
        before = self._seen.setdefault(folded, (name, is_folder))
        if before[0] != name:
            raise ModelArtifactError(
                f"{self._archive}: {quoted(before[0])} and {quoted(name)} mean the same file where "
                "case or accents are folded."
            )
        # A folder may be named again: every file in it names it.
        if not new and not (is_folder and before[1]):
            raise ModelArtifactError(f"{self._archive}: {quoted(name)} is there twice.")


def _parts(name: str) -> tuple[str, ...]:
    return tuple(part for part in name.split("/") if part not in ("", "."))


def _name_fault(name: str, limits: Limits) -> str | None:
    """Return what is wrong with a member's name, as the end of a sentence, or None."""
    if any("\ud800" <= character <= "\udfff" for character in name):
        return "has a name that is not UTF-8"
    if any(character < " " or character == "\x7f" for character in name):
        return "has a control character in its name"
    if name.startswith("/") or re.match(r"[A-Za-z]:", name):
        return "has an absolute path"
    if "\\" in name:
        return "has a backslash in its name"
    parts = _parts(name)
    if ".." in parts:
        return "leads out of the archive"
    if len(name.encode()) > limits.archive_max_name_bytes or any(
        len(part.encode()) > _MAX_NAME_PART_BYTES for part in parts
    ):
        return "has too long a name"
    if len(parts) > limits.archive_max_depth:
        return f"lies more than {limits.archive_max_depth} folders deep"
    return None


def _listed_name(member: Member, limits: Limits) -> str | None:
    """Return a regular file's name as callers write it; None for folders and refused members."""
    if member.is_folder or member.refused_kind or _name_fault(member.name, limits):
        return None
    return "/".join(_parts(member.name)) or None
