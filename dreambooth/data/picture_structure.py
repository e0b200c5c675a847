"""Refuse pictures whose parts would keep a decoder busy for minutes, before any decoder sees them.

A few megabytes can hold thousands of scans, chunks or blocks, and decoders take time for each. The
caps leave room for real pictures of 120 megapixels; what passes takes about as long as its bytes
and pixels do. Only the structure is walked here: what makes no sense is left to the decoder, which
says so.
"""

from __future__ import annotations

import contextlib
import re
import struct
from collections.abc import Callable, Mapping
from typing import BinaryIO, Final

from dreambooth.limits import LIMITS, Limits

_BLOCK: Final = 2**16
_MOST_DIRECTORIES: Final = 16

# In compressed data restart markers and escaped bytes are none; Pillow counts them elsewhere.
_MARKER, _MARKER_IN_DATA = (
    re.compile(rb"\xff[^\x00\xff%s]" % also) for also in (b"", b"\xd0-\xd7")
)
_FILL = b"\xff" * 1024
_SOS, _EOI, _PHOTOSHOP, _FRAMES = 0xDA, 0xD9, 0xED, {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_BARE = {0x01, *range(0xD0, 0xDA)}  # markers without a length
_PIXEL_CHUNKS = {b"IDAT", b"fdAT", b"fcTL"}
_STRIP_TAGS = {273, 279, 324, 325}
_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT, _TILES = 256, 257, 322, 323, 324
_BYTE_COUNT_TAGS, _KINDS_OF_COUNTS = {279, 325}, {3: "H", 4: "I", 16: "Q"}
_TIFF_START = re.compile(rb"II\*\0|MM\0\*")
_BYTE_KINDS = {1, 2, 7}  # bytes, text, anything: Pillow keeps these as they are
_DIRECTORY_TAGS = {34665, 34853, 40965}  # of Exif, GPS and interoperability


def why_slow(file: BinaryIO, kind: str, limits: Limits = LIMITS) -> str | None:
    """Return what makes a picture slow to decode, as the end of a sentence, or None.

    kind: one of `picture_files.FORMATS`. The file's position is left anywhere.
    """
    walk = _WALKS.get(kind)
    try:
        return walk(file, limits) if walk is not None else None
    except (struct.error, IndexError):  # the file ends too early, as the decoder will find
        return None


def _jpeg(file: BinaryIO, limits: Limits) -> str | None:
    segments = scans = pixels = junk = exif = photoshop = 0
    at = 2
    while True:
        start = at
        at, marker, fill = _next_marker(file, at, _MARKER_IN_DATA if scans else _MARKER)
        junk += fill if scans else at - 2 - start
        if junk > limits.max_jpeg_junk_bytes:
            return f"has {junk} bytes or more between its segments"
        if marker is None or (marker == _EOI and scans):
            return None
        segments += 1
        if segments > limits.max_jpeg_segments:
            return f"has more than {limits.max_jpeg_segments} segments"
        if marker in _BARE:
            continue
        file.seek(at)
        head = file.read(16)
        (length,) = struct.unpack(">H", head[:2])
        if marker in _FRAMES:
            height, width = struct.unpack(">HH", head[3:7])
            pixels = max(pixels, height * width)
        photoshop += marker == _PHOTOSHOP
        exif += length if head[2:6] == b"Exif" else 0
        if photoshop > limits.max_jpeg_photoshop_segments or exif > limits.max_exif_bytes:
            return f"has {photoshop} Photoshop segments and {exif} bytes of Exif, or more"
        scans += marker == _SOS
        if scans > limits.max_jpeg_scans or scans * pixels > limits.max_jpeg_scan_pixels:
            return f"has {scans} scans or more of {pixels} pixels each"
        at += max(2, length)


def _next_marker(
    file: BinaryIO, at: int, pattern: re.Pattern[bytes]
) -> tuple[int, int | None, int]:
    """Return the place behind the next marker, its second byte, and a count of bytes that fill.

    The byte is None at the file's end. Runs of 0xff are counted where they are long: the decoder
    reads a run again with each piece of it that arrives.
    """
    fill = 0
    file.seek(at)
    while len(block := file.read(_BLOCK)) > 1:
        found = pattern.search(block)
        end = len(block) if found is None else found.end()
        fill += block.count(_FILL, 0, end) * len(_FILL)
        if found is not None:
            return at + end, block[end - 1], fill
        at += end - block.endswith(b"\xff")  # a marker may be cut by the block's end
        file.seek(at)
    return at, None, fill


def _png(file: BinaryIO, limits: Limits) -> str | None:
    size = file.seek(0, 2)
    most = limits.max_picture_chunks + size // limits.min_picture_chunk_bytes
    chunks = others = 0
    at = 8
    while at < size:
        file.seek(at)
        length, name = struct.unpack(">I4s", file.read(8))
        if name == b"IEND":
            return None
        chunks += 1
        others += name not in _PIXEL_CHUNKS
        if chunks > most or others > limits.max_png_other_chunks:
            return f"has {chunks} chunks or more, {others} of them without pixels"
        if name == b"eXIf" and length > limits.max_exif_bytes:
            return f"has {length} bytes of Exif"
        at += 12 + length
    return None


def _webp(file: BinaryIO, limits: Limits) -> str | None:
    size = file.seek(0, 2)
    at = 12
    most = limits.max_picture_chunks + size // limits.min_picture_chunk_bytes
    for _ in range(most):
        file.seek(at)
        name, length = struct.unpack("<4sI", file.read(8))
        if name == b"EXIF" and length > limits.max_exif_bytes:
            return f"has {length} bytes of Exif"
        at += 8 + length + length % 2
    return (
        f"has more than {limits.max_picture_chunks + size // limits.min_picture_chunk_bytes} chunks"
    )


def _gif(file: BinaryIO, limits: Limits) -> str | None:
    file.seek(10)
    flags = file.read(3)[0]
    file.seek(13 + (3 << (flags & 7) + 1) * (flags >> 7))
    in_extension = False
    for _ in range(limits.max_gif_blocks):
        mark = file.read(1)
        if in_extension:
            in_extension = mark != b"\0"
            file.seek(mark[0], 1)
        elif mark in (b"", b",", b";"):
            return None
        elif mark == b"!":
            in_extension = True
            file.seek(1, 1)
    return f"has more than {limits.max_gif_blocks} blocks of text in front of its first frame"


def _avif(file: BinaryIO, limits: Limits) -> str | None:
    """Walk the Exif, wherever the boxes put it; pixels that look like its first bytes are rare."""
    starts: list[int] = []
    at = 0
    while len(starts) <= _MOST_DIRECTORIES and file.seek(at) == at:
        block = file.read(_BLOCK)
        starts += (at + found.start() for found in _TIFF_START.finditer(block))
        if len(block) < _BLOCK:
            break
        at += _BLOCK - 3  # a start may be cut by the block's end
    for start in starts:
        with contextlib.suppress(struct.error):
            if (slow := _tiff(file, limits, start)) is not None:
                return slow
    return "has too many blocks of Exif" if len(starts) > _MOST_DIRECTORIES else None


def _tiff(file: BinaryIO, limits: Limits, base: int = 0) -> str | None:
    """Walk the first directory of a TIFF, and those it names. base: where the TIFF begins."""
    size = file.seek(0, 2)
    file.seek(base)
    head = file.read(16)
    order = "<" if head[:2] == b"II" else ">"
    is_big = 43 in head[2:4]
    first = struct.unpack(order + ("Q" if is_big else "I"), head[8:16] if is_big else head[4:8])
    directories = [*first]
    for at in directories:
        if at >= 2**62 or len(directories) > _MOST_DIRECTORIES:
            continue
        file.seek(base + at)
        (count,) = struct.unpack(order + ("Q" if is_big else "H"), file.read(8 if is_big else 2))
        if count > limits.max_tiff_tags:
            return f"has {count} tags"
        sides: dict[int, int] = {}
        for _ in range(count):
            entry = file.read(20 if is_big else 12)
            tag, kind, numbers, value = struct.unpack(order + ("HHQQ" if is_big else "HHII"), entry)
            if tag in _STRIP_TAGS and numbers > limits.max_tiff_strips:
                return f"has {numbers} strips or tiles"
            if kind not in _BYTE_KINDS and numbers > limits.max_tiff_tag_numbers:
                return f"has {numbers} numbers in one tag"
            if tag in _DIRECTORY_TAGS:
                directories.append(value)
            sides |= _side(order, tag, kind, numbers, entry[12 if is_big else 8 :])
            if tag in _BYTE_COUNT_TAGS and kind in _KINDS_OF_COUNTS:
                code = f"{order}{numbers}{_KINDS_OF_COUNTS[kind]}"
                described = sum(_numbers(file, code, entry[12 if is_big else 8 :], base + value))
                if described > limits.max_tiff_ratio * size:
                    return f"describes {described} bytes of pixels in a file of {size}"
        pixels = sides.get(_WIDTH, 0) * sides.get(_HEIGHT, 0)
        tiled = sides.get(_TILES, 0) * sides.get(_TILE_WIDTH, 0) * sides.get(_TILE_HEIGHT, 0)
        if tiled > limits.max_tiff_ratio * pixels + limits.max_tiff_tile_pixels:
            return f"has tiles of {tiled} pixels for a picture of {pixels}"
    return None


def _side(order: str, tag: int, kind: int, numbers: int, inline: bytes) -> dict[int, int]:
    """Return a length that a tag gives in pixels, or the number of tiles, by the tag."""
    if tag == _TILES:
        return {tag: numbers}
    if tag not in (_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT) or kind not in _KINDS_OF_COUNTS:
        return {}
    code = order + _KINDS_OF_COUNTS[kind]
    return {tag: struct.unpack_from(code, inline)[0]}


def _numbers(file: BinaryIO, code: str, inline: bytes, offset: int) -> tuple[int, ...]:
    """Return the numbers of a tag: they lie in the tag itself, or elsewhere if they are many."""
    length = struct.calcsize(code)
    if length <= len(inline):
        return struct.unpack(code, inline[:length])
    here = file.tell()
    file.seek(min(offset, 2**62))
    content = file.read(length)
    file.seek(here)
    return struct.unpack(code, content)


def _bmp(file: BinaryIO, limits: Limits) -> str | None:
    size = file.seek(0, 2)
    file.seek(14)
    header, width, height, _, _, compression = struct.unpack("<IiiHHI", file.read(20))
    if header < 40 or compression not in (1, 2):
        return None
    if size > limits.max_rle_bytes or abs(width * height) > limits.max_rle_pixels:
        return f"is a run-length encoded BMP of {size} bytes and {abs(width * height)} pixels"
    return None


_WALKS: Mapping[str, Callable[[BinaryIO, Limits], str | None]] = {
    "JPEG": _jpeg,
    "PNG": _png,
    "WEBP": _webp,
    "GIF": _gif,
    "TIFF": _tiff,
    "AVIF": _avif,
    "BMP": _bmp,
}
