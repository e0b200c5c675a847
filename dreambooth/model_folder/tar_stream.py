"""Reads the members of a tarball once, from front to back, with caps on everything.

tarfile only decodes single 512-byte header blocks here (POSIX.1-2001 "pax Interchange Format"),
because its own loop reads headers of any size into memory. `archives` decides whether a member may
be unpacked; this module caps size, number of members and compression ratio before anything is read
into memory. Standard library only.
"""

from __future__ import annotations

import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dreambooth.errors import ModelArtifactError
from dreambooth.limits import Limits
from dreambooth.model_folder.mistaken_files import refuse_other_archive

_BLOCK: Final = tarfile.BLOCKSIZE
_CHUNK: Final = 1 << 20
_PAX_HEADER: Final = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_WITHOUT_CONTENT: Final = (
    tarfile.DIRTYPE,
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.FIFOTYPE,
)
_REFUSED_KINDS: Final = {
    tarfile.LNKTYPE: "a hard link (tar --hard-dereference packs the file instead)",
    tarfile.SYMTYPE: "a symbolic link (tar -h packs what it points to)",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a FIFO",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One entry of an archive, with its name as spelled there.

    refused_kind: what the entry is, for a message, unless it is a regular file or a folder.
    """

    name: str
    size: int
    is_folder: bool
    refused_kind: str | None


class Tar:
    """An archive whose members are read once, from front to back."""

    def __init__(self, archive: Path, limits: Limits) -> None:
        self._archive = archive
        self._limits = limits
        self._bytes = _Bytes(archive, limits)
        self._left = 0  # bytes of the current member's content not yet read
        self._padding = 0

    def __enter__(self) -> Tar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bytes.close()

    def members(self) -> Iterator[Member]:
        """Yield every file, folder and refused entry; content that is not read is skipped."""
        extended: dict[str, str] = {}
        members = headers = 0
        while (header := self._header()) is not None:
            headers += 1
            if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
                value = self._extension(header).rstrip(b"\0").decode("utf-8", "surrogateescape")
                extended["path" if header.type == tarfile.GNUTYPE_LONGNAME else "linkpath"] = value
            elif header.type in _PAX_HEADER:
                extended |= self._pax(self._extension(header))
            elif header.type == tarfile.XGLTYPE:
                if self._pax(self._extension(header)).keys() & {"path", "size"}:
                    raise self._damaged("a global header names a file")
            else:
                members += 1
                yield self._member(header, extended)
                extended = {}
                self._skip()
            if max(members, headers // 4) > self._limits.archive_max_members:
                raise self._damaged(f"more than {self._limits.archive_max_members} members")

    def content(self) -> Iterator[bytes]:
        """Yield the current member's content, in chunks of at most 1 MiB."""
        while self._left:
            chunk = self._bytes.read(min(self._left, _CHUNK))
            self._left -= len(chunk)
            yield chunk

    def finish(self) -> None:
        """Read to the end of the file, where gzip stores its checksum."""
        self._bytes.drain()

    def _header(self) -> tarfile.TarInfo | None:
        block = self._bytes.read(_BLOCK)
        if not block.strip(b"\0"):
            return None
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError) as error:
            raise self._damaged("not a tar archive, or damaged") from error
        if header.size < 0:
            raise self._damaged("a member of negative size")
        return header

    def _extension(self, header: tarfile.TarInfo) -> bytes:
        """Return the content of a header that describes the next member."""
        if header.size > self._limits.archive_max_header_bytes:
            raise self._damaged(f"a header of {header.size} bytes")
        self._begin(header.size)
        content = b"".join(self.content())
        self._skip()
        return content

    def _pax(self, content: bytes) -> dict[str, str]:
        """Return the records ``<length> <key>=<value>\\n`` of an extended header."""
        records: dict[str, str] = {}
        position = 0
        while position < len(content):
            match = re.compile(rb"([0-9]{1,7}) ([^=]+)=").match(content, position)
            if match is None:
                break
            end = position + int(match[1])
            if end <= match.end() or content[end - 1 : end] != b"\n":
                break
            key = match[2].decode("utf-8", "surrogateescape")
            records[key] = content[match.end() : end - 1].decode("utf-8", "surrogateescape")
            position = end
        if content[position:].strip(b"\0"):
            raise self._damaged("a damaged extended header")
        return records

    def _member(self, header: tarfile.TarInfo, extended: dict[str, str]) -> Member:
        size_text = extended.get("size", str(header.size))
        if not re.fullmatch("[0-9]{1,18}", size_text):
            raise self._damaged("a member without a proper size")
        is_folder = header.type == tarfile.DIRTYPE
        is_file = header.type in tarfile.REGULAR_TYPES and header.type != tarfile.GNUTYPE_SPARSE
        refused = (
            None if is_folder or is_file else _REFUSED_KINDS.get(header.type, "of no known kind")
        )
        if any(key.startswith("GNU.sparse.") for key in extended):
            refused = "a sparse file"
        # Folders, links and devices carry no content, whatever size their header states.
        size = 0 if header.type in _WITHOUT_CONTENT else int(size_text)
        self._begin(size)
        return Member(
            name=extended.get("path", header.name),
            size=size,
            is_folder=is_folder,
            refused_kind=refused,
        )

    def _begin(self, size: int) -> None:
        self._bytes.announce(size)
        self._left = size
        self._padding = -size % _BLOCK

    def _skip(self) -> None:
        self._bytes.skip(self._left + self._padding)
        self._left = self._padding = 0

    def _damaged(self, what: str) -> ModelArtifactError:
        return ModelArtifactError(f"{self._archive}: {what}.")


class _Bytes:
    """The bytes of the tar inside an archive, counted before and after decompression."""

    def __init__(self, archive: Path, limits: Limits) -> None:
        self._archive = archive
        self._limits = limits
        self._given = 0
        self._taken = 0
        self._pending = b""
        if not archive.is_file():
            raise ModelArtifactError(f"There is no archive {archive}.")
        refuse_other_archive(archive)
        try:
            self._file = archive.open("rb")
            magic = self._file.peek(2)[:2]
        except OSError as error:
            raise ModelArtifactError(f"{archive} cannot be read: {error.strerror}.") from error
        self._inflate = zlib.decompressobj(wbits=31) if magic == b"\x1f\x8b" else None

    def close(self) -> None:
        self._file.close()

    def announce(self, size: int) -> None:
        """Refuse content that would pass the size cap, before any of it is written."""
        if self._given + size > self._limits.archive_max_bytes:
            raise ModelArtifactError(
                f"{self._archive} unpacks to more than {self._limits.archive_max_bytes} bytes."
            )

    def read(self, size: int) -> bytes:
        """Return exactly ``size`` bytes."""
        pieces = []
        while size:
            piece = self._some(min(size, _CHUNK))
            if not piece:
                raise ModelArtifactError(f"{self._archive} ends too early: it was cut short.")
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)

    def skip(self, size: int) -> None:
        """Skip ``size`` bytes, without reading them where the archive is not compressed."""
        if self._inflate is None and size > _CHUNK:
            # The last byte is read, so that a truncated file is noticed.
            self._given += size - 1
            self._taken += size - 1
            self._file.seek(size - 1, os.SEEK_CUR)
            size = 1
        while size:
            size -= len(self.read(min(size, _CHUNK)))

    def drain(self) -> None:
        """Read and drop the rest of a compressed archive, so that its checksum is verified."""
        while self._inflate is not None and self._some(_CHUNK):
            pass

    def _some(self, size: int) -> bytes:
        """Return 1 to ``size`` bytes; none at the end."""
        try:
            piece = self._read_file(size) if self._inflate is None else self._inflated(size)
        except OSError as error:
            raise ModelArtifactError(
                f"{self._archive} cannot be read: {error.strerror or error}."
            ) from error
        except zlib.error as error:
            raise ModelArtifactError(f"{self._archive} is damaged: {error}.") from error
        self._given += len(piece)
        self.announce(0)
        free, ratio = self._limits.archive_ratio_free_bytes, self._limits.archive_max_ratio
        if self._given > free and self._given > ratio * self._taken:
            raise ModelArtifactError(
                f"{self._archive} unpacks to over {ratio:g} times its size, as no model does; it "
                "is refused as a decompression bomb."
            )
        return piece

    def _read_file(self, size: int) -> bytes:
        data = self._file.read(size)
        self._taken += len(data)
        return data

    def _inflated(self, size: int) -> bytes:
        """Return the next decompressed bytes, across the borders of concatenated gzip streams."""
        assert self._inflate is not None
        while True:
            if self._inflate.eof:
                rest = (self._inflate.unused_data or self._read_file(_CHUNK)).lstrip(b"\0")
                while not rest:  # zeros may pad the file
                    more = self._read_file(_CHUNK)
                    if not more:
                        return b""
                    rest = more.lstrip(b"\0")
                self._inflate, self._pending = zlib.decompressobj(wbits=31), rest
            if not self._pending:
                self._pending = self._read_file(_CHUNK)
                if not self._pending:
                    raise ModelArtifactError(f"{self._archive} ends too early: it was cut short.")
            piece = self._inflate.decompress(self._pending, size)
            self._pending = self._inflate.unconsumed_tail
            if piece:
                return piece
