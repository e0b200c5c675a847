"""`python -m dreambooth pack` packs a model folder into the model.tar.gz of an endpoint.

The archive holds the files of a model folder at its top level and nothing else; `with_code` adds
`code/`, with which SageMaker's inference toolkits call our four functions. The same folder always
gives the same bytes: names are sorted, times and owners are fixed.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import logging
import os
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from dreambooth.errors import ModelArtifactError, UserError
from dreambooth.limits import LIMITS, MIB, Limits, size_in_words
from dreambooth.model_folder import code_folder, destination, headers, layout, source
from dreambooth.process import files
from dreambooth.process.progress import Progress

logger = logging.getLogger(__name__)

_SUFFIXES: Final = (".tar.gz", ".tgz")
_WEIGHTED: Final = (*layout.TRAINED_PARTS, "safety_checker")
# The other files that are packed: _PLAIN of a component, _PICTURES of `samples/`. A vocabulary may
# be a SentencePiece model (.model).
_PLAIN: Final = (".json", ".txt", ".model")
_PICTURES: Final = (".png", ".jpg", ".jpeg", ".webp")
# gzip without compression. Measured 2026-11-22 on one core: levels 1 and 6 shrink float weights by
# 7 % at 22 MB/s, which takes four minutes for Stable Diffusion; level 0 stores them at 240 MB/s.
_LEVEL: Final = 0
# 1980-01-01, the first day that every archive format can hold.
_TIME: Final = 315_532_800


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedFile:
    """A file of the archive. origin: the file that it is read from, or its content."""

    name: str
    origin: Path | bytes

    @property
    def size(self) -> int:
        """Return its bytes."""
        return len(self.origin) if isinstance(self.origin, bytes) else self.origin.stat().st_size


def write(model: str, out: Path, *, with_code: bool = False, limits: Limits = LIMITS) -> None:
    """Pack a model folder, tarball, hub id or `tiny` into the new archive `out`.

    `out` appears only when it is complete. Raises UserError where `out` exists already or
    ends in neither .tar.gz nor .tgz, ModelArtifactError for anything but a complete model in
    safetensors, and ResourceError where the archive cannot be written.
    """
    if not out.name.lower().endswith(_SUFFIXES):
        raise UserError(f"{out} must end in .tar.gz, for a gzipped tar is what it will be.")
    if os.path.lexists(out):
        raise UserError(f"{out} is there already: remove it, or give another name.")
    with contextlib.ExitStack() as stack:
        stack.enter_context(
            files.disk_faults_named("The archive", out, elsewhere="choose another place")
        )
        out.parent.mkdir(parents=True, exist_ok=True)
        workspace = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix=".partial-", dir=out.parent))
        )
        found = source.locate(model, given="as MODEL", limits=limits)
        folder = source.open_source(found, workspace / "opened", limits=limits)
        members = members_of(folder, with_code=with_code, limits=limits)
        packed = workspace / "packed"
        with packed.open("wb") as file:
            write_members(file, members)
        files.put_in_place(packed, out)


def members_of(
    folder: Path, *, with_code: bool = False, limits: Limits = LIMITS
) -> list[PackedFile]:
    """Return what the archive of a model folder holds. Raises ModelArtifactError, as `write`."""
    members = [PackedFile(name=name, origin=folder / name) for name in _names(folder, limits)]
    if with_code:
        members += _code()
    members.sort(key=lambda member: member.name)
    _check_size(folder, members, limits)
    return members


def _names(folder: Path, limits: Limits) -> list[str]:
    """Return a model folder's files, relative to it; warn of others, which are left out."""
    index = layout.read_index(folder, limits=limits)
    names: list[str] = []
    for entry in destination.ENTRIES:
        path = folder / entry
        if entry in layout.OPTIONAL_PARTS and index.get(entry) in (None, [], [None, None]):
            continue
        if entry in _WEIGHTED and path.is_dir():
            files = _weighted(path, limits)
        elif path.is_dir():
            suffixes = _PICTURES if entry == "samples" else _PLAIN
            files = [child for child in path.iterdir() if child.suffix in suffixes]
        else:
            files = [path] if os.path.lexists(path) else []
        for file in files:
            if not file.is_file():
                raise ModelArtifactError(f"{file} is no regular file, or a link to nothing.")
            if not file.name.startswith("."):
                names.append(file.relative_to(folder).as_posix())
    others = sorted({child.name for child in folder.iterdir()} - {*destination.ENTRIES, "code"})
    if shown := [name for name in others if not name.startswith(".")]:
        more = f" and {len(shown) - 5} more" if len(shown) > 5 else ""
        logger.warning("left out, no part of a model folder: %s%s", ", ".join(shown[:5]), more)
    return names


def _weighted(component: Path, limits: Limits) -> list[Path]:
    """Return a component's configuration and the one copy of its weights that is read."""
    chosen, files = layout.weight_files(component, limits=limits)
    if chosen.pickled:
        raise ModelArtifactError(
            f"{component} holds old pickled weights (.bin), and archives are made of safetensors "
            "alone: run `python -m dreambooth convert IN OUT` first, and pack what comes out."
        )
    for path in files:  # else any text behind a link could be packed
        headers.read_header(path, limits=limits)
    return sorted({component / "config.json", component / chosen.name, *files})


def _code() -> list[PackedFile]:
    """Return the files of `code/`: our modules and their requirements."""
    members = [
        PackedFile(name=f"code/{path.as_posix()}", origin=code_folder.ROOT / path)
        for path in code_folder.sources()
    ]
    needed = code_folder.REQUIREMENTS.encode()
    return [*members, PackedFile(name="code/requirements.txt", origin=needed)]


def _check_size(folder: Path, members: list[PackedFile], limits: Limits) -> None:
    """Refuse what our own extractor would not unpack, before minutes are spent on writing it."""
    size = sum(member.size for member in members)
    if size > limits.archive_max_bytes:
        raise ModelArtifactError(
            f"{folder} comes to {size_in_words(size)}, more than the "
            f"{size_in_words(limits.archive_max_bytes)} of the largest archive that is unpacked "
            "again: is it the right folder?"
        )
    if len(members) > limits.archive_max_members:
        raise ModelArtifactError(
            f"{folder} comes to {len(members)} files, more than the {limits.archive_max_members} "
            "of the largest archive that is unpacked again: thin out its samples/."
        )


def write_members(file: BinaryIO, members: list[PackedFile]) -> None:
    """Write the archive to an open file, which may be a pipe: nothing is read or sought there.

    Raises ModelArtifactError where a member cannot be read any more.
    """
    total = sum(member.size for member in members)
    with (
        gzip.GzipFile("", "wb", _LEVEL, file, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
        Progress(-(-total // MIB), "pack", stream=sys.stderr, unit="MiB") as progress,
    ):
        before = 0
        for member in members:
            entry = tarfile.TarInfo(member.name)
            entry.size, entry.mode, entry.mtime = member.size, 0o644, _TIME
            with _opened(member) as content:
                tar.addfile(entry, _Counted(content, before, progress))  # type: ignore[arg-type]
            before += entry.size


def _opened(member: PackedFile) -> BinaryIO:
    if isinstance(member.origin, bytes):
        return io.BytesIO(member.origin)
    try:
        return member.origin.open("rb")
    except OSError as error:
        raise ModelArtifactError(f"{member.origin} cannot be read: {error.strerror}.") from error


class _Counted:
    """A file that advances the progress bar as it is read."""

    def __init__(self, file: BinaryIO, before: int, progress: Progress) -> None:
        self._file = file
        self._done = before
        self._progress = progress

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._done += len(data)
        self._progress.update(self._done // MIB)
        return data
