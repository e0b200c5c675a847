"""Pictures whose structure takes long to decode, and pictures that only the conversion refuses."""

from __future__ import annotations

import contextlib
import io
import re
import secrets
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, TiffImagePlugin

from dreambooth.data import images
from dreambooth.data.picture_files import FORMATS, PictureError
from dreambooth.data.picture_structure import why_slow


def saved(kind: str, mode: str = "RGB", size: tuple[int, int] = (48, 40), **options: Any) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def behind_start(extra: bytes) -> bytes:
    jpeg = saved("JPEG")
    return jpeg[:2] + extra + jpeg[2:]


def before_end(extra: bytes) -> bytes:
    return saved("JPEG")[:-2] + extra + b"\xff\xd9"


def empty_scans(count: int, size: tuple[int, int]) -> bytes:
    """Return a progressive JPEG of one colour with its last scan written again and again."""
    buffer = io.BytesIO()
    Image.new("RGB", size, "teal").save(buffer, "JPEG", progressive=True)
    jpeg = buffer.getvalue()
    tables = jpeg.rindex(b"\xff\xc4", 0, jpeg.rindex(b"\xff\xda"))
    return jpeg[:-2] + jpeg[tables:-2] * count + b"\xff\xd9"


def chunk(name: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def chunks_of(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        yield png[at + 4 : at + 8], png[at : at + 12 + length]
        at += 12 + length


def with_chunks(extra: bytes, *, behind: bool = False) -> bytes:
    png = saved("PNG")
    at = png.index(b"IEND" if behind else b"IDAT") - 4
    return png[:at] + extra + png[at:]


def tiff(*entries: tuple[int, int, int, int | bytes]) -> bytes:
    """Return a TIFF of one directory: tag, type, count, and the value or what it points at."""
    table, behind = b"", b""
    for tag, kind, count, value in entries:
        place = value if isinstance(value, int) else 14 + 12 * len(entries) + len(behind)
        behind += value if isinstance(value, bytes) else b""
        table += struct.pack("<HHII", tag, kind, count, place)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + b"\0" * 4 + behind


def big_tiff(*entries: tuple[int, int, int, int], count: int) -> bytes:
    table = b"".join(struct.pack("<HHQQ", *entry) for entry in entries)
    return b"II+\0" + struct.pack("<HHQQ", 8, 0, 16, count) + table


def rationals(count: int) -> bytes:
    return tiff((0x112, 5, count, b"\1\0\0\0" * 2 * count))


def gif(extra: bytes) -> bytes:
    whole = saved("GIF", "P")
    at = 13 + (3 << (whole[10] & 7) + 1)
    return whole[:at] + extra + whole[at:]


def bmp(width: int, height: int, bits: int, data: bytes) -> bytes:
    fields = (40, width, height, 1, bits, 1 if bits == 8 else 2, len(data), 0, 0, 1 << bits, 0)
    palette = b"\1\2\3\0" * (1 << bits)
    start = 54 + len(palette)
    head = b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start)
    return head + struct.pack("<IiiHHIIiiII", *fields) + palette + data


def webp(extra: bytes) -> bytes:
    simple = saved("WEBP", lossless=True)[12:]
    extended = b"VP8X" + struct.pack("<IIHBHB", 10, 8, 47, 0, 39, 0)
    body = b"WEBP" + extended + simple + extra
    return b"RIFF" + struct.pack("<I", len(body)) + body


def strips(count: int, stated: int, *, kind: int = 4) -> bytes:
    counts = struct.pack("<I" if kind == 4 else "<H", stated) * count
    return tiff(
        *((256, 3, 1, 40), (257, 4, 1, count), (258, 3, 1, 8), (259, 3, 1, 32773), (262, 3, 1, 1)),
        *((273, 4, count, b"\x08\0\0\0" * count), (277, 3, 1, 1), (278, 3, 1, 1)),
        (279, kind, count, counts),
    )


def tiles(width: int, height: int, tile_width: int, tile_height: int) -> bytes:
    count = -(-width // tile_width) * -(-height // tile_height)
    ends = struct.pack("<I", 8) * count
    return tiff(
        *((256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 1), (259, 3, 1, 4), (262, 3, 1, 0)),
        *((277, 3, 1, 1), (322, 4, 1, tile_width), (323, 4, 1, tile_height)),
        *((324, 4, count, ends if count > 1 else 8), (325, 4, count, ends if count > 1 else 5)),
    )


def avif_with_exif(count: int) -> bytes:
    # Pillow would not write such an orientation: the tag gets its number afterwards.
    exif = rationals(count).replace(b"\x12\1\5\0", b"\x13\1\5\0")
    return saved("AVIF", exif=b"Exif\0\0" + exif).replace(b"\x13\1\5\0", b"\x12\1\5\0")


EXIF = segment(0xE1, b"Exif\0\0MM\0*\0\0\0\x08\0\0")
SLOW: dict[str, tuple[str, Callable[[], bytes]]] = {
    "scans": ("JPEG", lambda: empty_scans(6_000, (64, 64))),
    "scans of many pixels": ("JPEG", lambda: empty_scans(95, (5_000, 4_500))),
    "exif": ("JPEG", lambda: behind_start(EXIF * 60_000)),
    "exif behind an end": ("JPEG", lambda: behind_start(b"\xff\xd9" + EXIF * 2_000)),
    "exif in parts": (
        "JPEG",
        lambda: behind_start(segment(0xE1, b"Exif\0\0" + b"x" * 65_000) * 20),
    ),
    "photoshop": ("JPEG", lambda: behind_start(segment(0xED, b"Photoshop 3.0\0") * 100)),
    "comments": ("JPEG", lambda: behind_start(segment(0xFE, b"x") * 2_000)),
    "comments behind the scan": ("JPEG", lambda: before_end(segment(0xFE, b"x") * 2_000)),
    "tables": ("JPEG", lambda: before_end(segment(0xDB, b"\0" + b"\1" * 64) * 2_000)),
    "marks": ("JPEG", lambda: behind_start(b"\xff\xd0" * 2_000)),
    "junk": ("JPEG", lambda: behind_start(segment(0xFE, b"") + b"\0" * 10**6)),
    "escaped junk": ("JPEG", lambda: behind_start(segment(0xFE, b"") + b"\xff\0" * 10**6)),
    "fill": ("JPEG", lambda: behind_start(b"\xff" * 10**6)),
    "fill in the scan": ("JPEG", lambda: before_end(b"\xff" * 10**6)),
    "fill in pieces": ("JPEG", lambda: before_end((b"\xff" * 60_000 + b"\0") * 4)),
    "text chunks": ("PNG", lambda: with_chunks(chunk(b"tEXt", b"a\0b") * 1_000)),
    "text chunks behind": ("PNG", lambda: with_chunks(chunk(b"iTXt") * 1_000, behind=True)),
    "profile chunks": (
        "PNG",
        lambda: with_chunks(chunk(b"iCCP", b"a\0\0" + zlib.compress(b"\0" * 10**6)) * 300),
    ),
    "unknown chunks": ("PNG", lambda: with_chunks(chunk(b"abCd") * 1_000, behind=True)),
    "empty pixels": ("PNG", lambda: with_chunks(chunk(b"IDAT") * 10_000)),
    "empty pixels behind": ("PNG", lambda: with_chunks(chunk(b"IDAT") * 10_000, behind=True)),
    "frames": ("PNG", lambda: with_chunks(chunk(b"fdAT", b"\0" * 4) * 10_000, behind=True)),
    "png exif": ("PNG", lambda: with_chunks(chunk(b"eXIf", rationals(500_000)))),
    "webp exif": ("WEBP", lambda: webp(b"EXIF" + struct.pack("<I", 4 * 10**6) + bytes(4 * 10**6))),
    "webp chunks": ("WEBP", lambda: webp(b"ABCD\0\0\0\0" * 10_000)),
    "avif exif": ("AVIF", lambda: avif_with_exif(500_000)),
    "comment blocks": ("GIF", lambda: gif(b"!\xfe" + b"\1a" * 10**5 + b"\0")),
    "comment extensions": ("GIF", lambda: gif(b"!\xfe\0" * 10**5)),
    "gif junk": ("GIF", lambda: gif(b"\1" * 10**6)),
    "tags": ("TIFF", lambda: tiff(*((n, 4, 1, 1) for n in range(60_000)))),
    "tags without end": ("TIFF", lambda: big_tiff(*[(256, 4, 1, 9)] * 99, count=2**40)),
    "exif tags without end": ("TIFF", lambda: big_tiff((34665, 4, 1, 24), count=1) + b"\xff" * 9),
    "rationals": ("TIFF", lambda: rationals(500_000)),
    "wide tiles": ("TIFF", lambda: tiles(100, 50_000, 2**26, 16)),
    "a few tall tiles": ("TIFF", lambda: tiles(100, 100, 16, 6_291_456)),
    "strips": ("TIFF", lambda: strips(200_000, 4)),
    "strips of the same bytes": ("TIFF", lambda: strips(9_000, 10**7)),
    "short strips of the same bytes": ("TIFF", lambda: strips(9_000, 60_000, kind=3)),
    "runs": ("BMP", lambda: bmp(4_000, 4_000, 8, b"\1\1" * 10**6 * 2)),
    "runs of many pixels": ("BMP", lambda: bmp(12_000, 10_000, 4, b"\xff\1" * 99)),
    "runs upside down": ("BMP", lambda: bmp(12_000, -10_000, 8, b"\xff\1" * 99)),
}


@pytest.mark.parametrize("name", SLOW)
def test_a_picture_that_would_take_minutes_is_refused_undecoded(tmp_path: Path, name: str) -> None:
    kind, make = SLOW[name]
    path = tmp_path / "slow.bin"
    path.write_bytes(make())
    with path.open("rb") as file:
        assert why_slow(file, kind) is not None
    for read in (images.check_image, images.open_image):
        with pytest.raises(PictureError, match="too long to decode"):
            read(path)


LAB = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
HONEST: dict[str, tuple[str, Callable[[], bytes]]] = {
    **{f"plain {kind}": (kind, lambda kind=kind: saved(kind)) for kind in FORMATS},  # type: ignore[misc]
    "progressive": ("JPEG", lambda: saved("JPEG", progressive=True, size=(900, 700))),
    "a large profile": ("JPEG", lambda: saved("JPEG", icc_profile=LAB + b"x" * 9 * 10**6)),
    "a thumbnail": ("JPEG", lambda: saved("JPEG", exif=b"Exif\0\0" + rationals(2) + b"x" * 50_000)),
    "restart markers": ("JPEG", lambda: saved("JPEG", size=(900, 700), restart_marker_blocks=1)),
    "two pictures": (
        "JPEG",
        lambda: saved("MPO", save_all=True, append_images=[Image.new("RGB", (48, 40))]),
    ),
    "a film behind": ("JPEG", lambda: saved("JPEG") + bytes(10**6) + b"\xff" * 10**6),
    "a large png": ("PNG", lambda: saved("PNG", size=(2_000, 1_500), compress_level=0)),
    "an animated png": (
        "PNG",
        lambda: saved(
            "PNG",
            save_all=True,
            append_images=[Image.new("RGB", (48, 40), (n, 0, 0)) for n in range(99)],
        ),
    ),
    "a commented gif": ("GIF", lambda: saved("GIF", "P", comment=b"x" * 10**5)),
    "a tiled tiff": ("TIFF", lambda: saved("TIFF", size=(900, 700), compression="tiff_lzw")),
    "a jpeg tiff": ("TIFF", lambda: saved("TIFF", size=(900, 700), compression="jpeg")),
    "a tiff with exif": ("TIFF", lambda: saved("TIFF", exif=_exif())),
    "an extended webp": ("WEBP", lambda: saved("WEBP", exif=_exif(), icc_profile=LAB)),
    "an avif with exif": ("AVIF", lambda: saved("AVIF", exif=_exif(), icc_profile=LAB)),
}


def _exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x010F] = "A camera"
    exif.get_ifd(0x8769)[0x829A] = 0.01
    return exif


@pytest.mark.parametrize("name", HONEST)
def test_real_pictures_pass(tmp_path: Path, name: str) -> None:
    kind, make = HONEST[name]
    path = tmp_path / "picture.bin"
    path.write_bytes(make())
    with path.open("rb") as file:
        assert why_slow(file, kind) is None
    facts = images.check_image(path)
    assert images.open_image(path).size == (facts.width, facts.height)


def _without_a_chunk() -> Iterator[bytes]:
    for mode, options in (
        *((mode, {}) for mode in ("1", "L", "P", "RGB", "RGBA", "LA", "I;16")),
        ("P", {"transparency": 3, "bits": 4}),
        ("L", {"transparency": 7}),
        ("RGB", {"transparency": (1, 2, 3), "icc_profile": LAB}),
    ):
        parts = list(chunks_of(saved("PNG", mode, **options)))
        for left_out, _ in parts:
            yield b"\x89PNG\r\n\x1a\n" + b"".join(p for name, p in parts if name != left_out)
        for name in (b"PLTE", b"tRNS", b"iCCP", b"gAMA"):
            for data in (b"", b"\0", b"abc", b"abcd", b"x" * 900):
                first, *others = (part for other, part in parts if other != name)
                yield b"\x89PNG\r\n\x1a\n" + first + chunk(name, data) + b"".join(others)


def _without_a_tag() -> Iterator[bytes]:
    for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "LAB", "I;16", "I", "F"):
        whole = saved("TIFF", mode)
        (at,) = struct.unpack("<I", whole[4:8])
        (count,) = struct.unpack("<H", whole[at : at + 2])
        for entry in range(at + 2, at + 2 + 12 * count, 12):
            for change in (b"\xff\xfe", b"\x12\x01"):
                yield whole[:entry] + change + whole[entry + 2 :]
            for value in (0, 1, 2, 3, 8, 255):
                yield whole[: entry + 8] + struct.pack("<I", value) + whole[entry + 12 :]


def _with_odd_headers() -> Iterator[bytes]:
    for kind, mode, length in (
        *(("BMP", mode, 60) for mode in ("1", "L", "P", "RGB", "RGBA")),
        *(("GIF", mode, 30) for mode in ("1", "L", "P")),
        *(("WEBP", mode, 40) for mode in ("RGB", "RGBA")),
    ):
        whole = saved(kind, mode)
        for at in range(length):
            for value in (0, 1, 3, 8, 128, 255):
                yield whole[:at] + bytes([value]) + whole[at + 1 :]


@pytest.mark.parametrize("make", [_without_a_chunk, _without_a_tag, _with_odd_headers])
def test_what_passes_the_check_can_be_trained_on(
    tmp_path: Path, make: Callable[[], Iterator[bytes]]
) -> None:
    passed = 0
    for number, data in enumerate(make()):
        path = tmp_path / f"{number}.bin"
        path.write_bytes(data)
        with contextlib.suppress(PictureError):
            facts = images.check_image(path)
            passed += 1
            try:
                assert images.open_image(path, sha256=facts.sha256).mode == "RGB"
            except PictureError as error:
                pytest.fail(f"{number}: {error}")
        path.unlink()
    assert passed > 10


COMPRESSIONS = sorted(set(TiffImagePlugin.COMPRESSION_INFO) - {1})
BITS_AND_COLOURS = [(1, 1, 0), (4, 1, 1), (8, 1, 1), (8, 3, 2), (8, 3, 6), (16, 3, 32845)]


def damaged_tiffs(compression: int, random: Random) -> Iterator[bytes]:
    """Yield TIFFs of many lines whose strips hold what their compression makes no sense of."""
    for bits, colours, meaning in BITS_AND_COLOURS:
        for data in (random.randbytes(9_000), bytes(9_000), random.randbytes(9) * 1_000):
            for strips in (1, 500):
                lines, each = 3_000 // strips, len(data) // strips
                places = [14 + 12 * 9 + 8 * strips + each * number for number in range(strips)]
                counts = struct.pack(f"<{strips}I", *[each] * strips)
                inline = strips == 1
                yield (
                    tiff(
                        (256, 4, 1, 64),
                        (257, 4, 1, 3_000),
                        (258, 3, 1, bits),
                        (259, 3, 1, compression),
                        (262, 3, 1, meaning),
                        (
                            273,
                            4,
                            strips,
                            places[0] if inline else struct.pack(f"<{strips}I", *places),
                        ),
                        (277, 3, 1, colours),
                        (278, 4, 1, lines),
                        (279, 4, strips, each if inline else counts),
                    )
                    + bytes(8 * inline)
                    + data
                )


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_damaged_tiff_is_one_sentence_and_nothing_is_printed(
    tmp_path: Path, compression: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """Libtiff goes on after an error in some ways of decoding, and said so for every line.

    Zeros and repeated bytes are pixels in a few compressions.
    """
    refused = 0
    for content in damaged_tiffs(compression, Random(compression)):
        (tmp_path / "a.tif").write_bytes(content)
        try:
            images.open_image(tmp_path / "a.tif")
        except PictureError as error:
            refused += 1
            with pytest.raises(PictureError, match=f"{re.escape(error.reason)}: replace"):
                images.check_image(tmp_path / "a.tif")
        else:
            images.check_image(tmp_path / "a.tif")
    assert refused >= 24
    assert capfd.readouterr() == ("", "")


def test_each_of_many_pictures_has_its_own_fault(tmp_path: Path) -> None:
    paths, random = [tmp_path / f"{number}.tif" for number in range(60)], Random(0)
    for number, path in enumerate(paths):
        damaged = next(damaged_tiffs((3, 5, 32773)[number // 2 % 3], random))
        path.write_bytes(damaged if number % 2 else saved("TIFF", compression="tiff_lzw"))
    together = images.check_images(paths)
    alone = [images.check_images([path])[0] for path in paths]
    assert [isinstance(found, PictureError) for found in alone] == [False, True] * 30
    assert [str(found) for found in together] == [str(found) for found in alone]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "LAB", "I;16", "F"])
def test_whole_tiffs_are_read_as_ever(tmp_path: Path, mode: str) -> None:
    """Their pixels are those of the same picture without compression."""
    lossless = ("tiff_lzw", "tiff_adobe_deflate", "packbits", "lzma", "zstd")
    fax = ("tiff_ccitt", "group3", "group4")
    (tmp_path / "raw.tif").write_bytes(saved("TIFF", mode))
    for compression in (*lossless, *(fax if mode == "1" else ())):
        path = tmp_path / f"{compression}.tif"
        path.write_bytes(saved("TIFF", mode, compression=compression))
        images.check_image(path)
        assert images.open_image(path) == images.open_image(tmp_path / "raw.tif")


PRINTED = [
    *(("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {}), ("BMP", {})),
    *(("WEBP", {"lossless": True}), ("GIF", {}), ("AVIF", {}), ("TIFF", {}), ("MPO", {})),
    *(("TIFF", {"compression": name}) for name in ("tiff_lzw", "packbits", "jpeg", "zstd")),
]


@pytest.mark.parametrize(("kind", "options"), PRINTED)
def test_no_decoder_prints_anything(
    tmp_path: Path, kind: str, options: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    whole, seed = saved(kind, size=(24, 20), **options), secrets.randbits(32)
    random = Random(seed)
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(random.choice((1, 3, 30))):
            damaged[random.randrange(12, len(whole))] = random.randrange(256)
        (tmp_path / "a").write_bytes(damaged)
        for read in (images.check_image, images.open_image):
            with contextlib.suppress(PictureError):
                read(tmp_path / "a")
    assert capfd.readouterr() == ("", ""), seed
