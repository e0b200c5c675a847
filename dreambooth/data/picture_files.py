"""Open an untrusted file safely, and detect the picture format inside.

The format is detected from the first bytes, never from the name; FIFOs, devices and oversized files
are refused before anything is read.
"""

from __future__ import annotations

import os
import re
import stat
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from dreambooth.errors import DatasetError, one_line
from dreambooth.limits import LIMITS, Limits

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
"""Pillow's names of the formats that are opened (multi-picture JPEG, MPO, comes in as JPEG)."""

FORMATS_TEXT = "PNG, JPEG, WebP, BMP, GIF, TIFF or AVIF"

_SNIFF_BYTES = 64
_NAMES_SHOWN = 5
_OBJECTS = re.compile(r"\s*<[\w.]+ [^<>]*>")  # <_io.BufferedReader name=5>
_BYTES = re.compile(r"\bb(['\"])(.*?)\1")  # b'IHDR'
# Messages of these are for the decoder's programmers ("'NoneType' object has no attribute ...").
_PROGRAMMERS = (
    *(TypeError, AttributeError, LookupError, ArithmeticError, AssertionError),
    struct.error,
)
_BMP_HEADER_SIZES = frozenset({12, 40, 52, 56, 64, 108, 124})


class PictureError(DatasetError):
    """One picture file cannot be used; `path` names it, `reason` says why, without the path."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"The picture {printable(path)} {reason}: replace or remove it.")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[type[PictureError], tuple[Path, str]]:
        """Pickle the two parts that the message is made of."""
        return type(self), (self.path, self.reason)


class NotAPictureError(PictureError):
    """The file cannot be read, or its first bytes are not those of a picture."""


def printable(path: Path | str) -> str:
    """Return a path for a message or a log line: printable, on one line."""
    return one_line(os.fspath(path), 1_000)


def listed(names: Sequence[str]) -> str:
    """Return the first five names and the count of the others."""
    rest = len(names) - _NAMES_SHOWN
    text = ", ".join(names[:_NAMES_SHOWN])
    return f"{text} and {rest} more" if rest > 0 else text


@contextmanager
def opened(path: Path, *, limits: Limits = LIMITS) -> Iterator[BufferedReader]:
    """Open a regular file for reading; never block on a FIFO and never touch a device.

    Raises NotAPictureError for a file that is not regular, too large or cannot be opened, and for
    an OSError inside the `with` block.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise NotAPictureError(path, "is not a regular file")
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise NotAPictureError(path, f"cannot be opened ({why(error)})") from error
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)  # again: the name may stand for another file by now
        if not stat.S_ISREG(found.st_mode):
            raise NotAPictureError(path, "is not a regular file")
        if found.st_size > limits.max_image_file_bytes:
            cap = limits.max_image_file_bytes
            raise NotAPictureError(path, f"has {found.st_size} bytes, more than the {cap} allowed")
        try:
            yield file
        except OSError as error:
            raise NotAPictureError(path, f"cannot be read ({why(error)})") from error


def why(error: BaseException) -> str:
    """Return the short reason of an exception for a message, in words and no Python notation."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    said = _BYTES.sub(r"\2", _OBJECTS.sub("", str(error)))
    if isinstance(error, _PROGRAMMERS) or not said:
        return "its content makes no sense"
    return printable(said)[:200]


def format_of(file: BinaryIO) -> str | None:
    """Return the picture format that the first bytes of an open file show, or None.

    Also names some formats that are not in `FORMATS` ("HEIC", "JPEG XL", "JPEG 2000", "Photoshop"),
    so that a message can mention them.
    """
    start = file.read(_SNIFF_BYTES)
    for magic, name in (
        (b"\x89PNG\r\n\x1a\n", "PNG"),
        (b"\xff\xd8\xff", "JPEG"),
        (b"GIF87a", "GIF"),
        (b"GIF89a", "GIF"),
        (b"II*\0", "TIFF"),
        (b"MM\0*", "TIFF"),
        (b"II+\0", "TIFF"),
        (b"MM\0+", "TIFF"),
        (b"8BPS", "Photoshop"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"\xff\x4f\xff\x51", "JPEG 2000"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"\xff\x0a", "JPEG XL"),
    ):
        if start.startswith(magic):
            return name
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "WEBP"
    # "BM" alone also begins many texts, so a known size of the header is required as well.
    if start[:2] == b"BM" and int.from_bytes(start[14:18], "little") in _BMP_HEADER_SIZES:
        return "BMP"
    if start[4:8] == b"ftyp":
        return _brand_of(start)
    return None


def _brand_of(start: bytes) -> str | None:
    """Return AVIF, HEIC or None by the brands of an ISO media file (ISO/IEC 14496-12, `ftyp`)."""
    end = min(int.from_bytes(start[:4], "big"), len(start))
    brands = {start[8:12], *(start[at : at + 4] for at in range(16, end, 4))}
    if brands & {b"avif", b"avis"}:
        return "AVIF"
    if brands & {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1"}:
        return "HEIC"
    return None
