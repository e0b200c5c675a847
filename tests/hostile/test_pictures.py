"""Files that are no pictures, are damaged or huge, and unusual pictures that are fine."""

from __future__ import annotations

import io
import os
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dreambooth.data import dataset_info, images

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")


def encoded(kind: str, size: tuple[int, int] = (64, 48), **options: Any) -> bytes:
    pixels = np.random.default_rng(1).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int, height: int, *, depth: int = 8, colour: int = 2, data: bytes | None = None
) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000) if data is None else data
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", data), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def bmp(width: int, height: int, bits: int = 24) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + header


def gif(width: int, height: int, tail: bytes = b";") -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0" * 6 + tail


def tiff(*entries: tuple[int, int, int, int], mark: bytes = b"II*\0", offset: int = 8) -> bytes:
    body = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *e) for e in entries)
    return mark + struct.pack("<I", offset) + body + b"\0" * 4


def jpeg_frame(width: int, height: int) -> bytes:
    frame = struct.pack(">HBHHB", 11, 8, height, width, 1) + b"\x01\x11\x00"
    return b"\xff\xd8\xff\xc0" + frame + b"\xff\xd9"


def webp(width: int, height: int) -> bytes:
    data = b"VP8X" + struct.pack("<I", 10) + b"\0\0\0\0"
    data += (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", len(data) + 4) + b"WEBP" + data


CUTS = {
    f"{kind} cut at {share:.0%}": (kind.lower(), encoded(kind)[: int(len(encoded(kind)) * share)])
    for kind in FORMATS
    for share in (0.01, 0.1, 0.25, 0.5)
}
STARTS = {
    f"{kind}, {count} bytes": (kind.lower(), encoded(kind)[:count])
    for kind in FORMATS
    for count in (0, 1, 4, 12)
}
SWAPPED = {
    f"{kind} with zeros behind its first bytes": (
        kind.lower(),
        encoded(kind)[:24] + b"\0" * 2000,
    )
    for kind in FORMATS
}
BOMBS = {
    "png 60000 x 60000": ("png", png(60_000, 60_000)),
    "png 2^31 x 1": ("png", png(2**31 - 1, 1)),
    "png 1 x 2^31": ("png", png(1, 2**31 - 1)),
    "png of no width": ("png", png(0, 10)),
    "png of no height": ("png", png(10, 0)),
    "bmp 50000 x 50000": ("bmp", bmp(50_000, 50_000)),
    "bmp of no width": ("bmp", bmp(0, 10)),
    "bmp upside down 2^31": ("bmp", bmp(10, -(2**31))),
    "bmp of 7 bits": ("bmp", bmp(10, 10, 7)),
    "gif 65535 x 65535": ("gif", gif(65_535, 65_535)),
    "gif of no frame": ("gif", gif(10, 10)),
    "gif of a broken block": ("gif", gif(10, 10, b"!\xff\x0b")),
    "jpeg 65500 x 65500": ("jpg", jpeg_frame(65_500, 65_500)),
    "jpeg of no width": ("jpg", jpeg_frame(0, 10)),
    "jpeg without a scan": ("jpg", jpeg_frame(10, 10)),
    "jpeg of its marks alone": ("jpg", b"\xff\xd8\xff\xd9"),
    "webp 16384 x 16384": ("webp", webp(16_384, 16_384)),
    "webp 10 x 10 without a frame": ("webp", webp(10, 10)),
    "tiff 60000 x 60000": ("tif", tiff((256, 4, 1, 60_000), (257, 4, 1, 60_000))),
    "tiff without a size": ("tif", tiff()),
    "tiff whose table is elsewhere": ("tif", tiff(offset=2**31)),
    "tiff whose table is itself": ("tif", tiff(offset=0)),
    "tiff of 65535 entries": ("tif", b"II*\0\x08\0\0\0\xff\xff"),
    "tiff with 2^31 strips": ("tif", tiff((256, 4, 1, 9), (257, 4, 1, 9), (273, 4, 2**31, 9))),
    "big tiff that is none": ("tif", b"II+\0" + b"\xff" * 60),
    "avif of its brand alone": ("avif", b"\0\0\0\x18ftypavif" + b"\0" * 12),
}
BROKEN = {
    "png of noise": ("png", b"\x89PNG\r\n\x1a\n" + os.urandom(300)),
    "png without data": ("png", png(10, 10, data=b"")),
    "png of too little data": ("png", png(100, 100, data=zlib.compress(b"\0" * 10))),
    "png of a broken stream": ("png", png(10, 10, data=b"no zlib at all")),
    "png of 3 bits": ("png", png(10, 10, depth=3)),
    "png of an unknown colour": ("png", png(10, 10, colour=5)),
    "png with a wrong checksum": ("png", encoded("PNG").replace(b"IHDR", b"IHDX")),
    "png without its header": ("png", b"\x89PNG\r\n\x1a\n" + chunk(b"IEND", b"")),
    "text called png": ("png", b"this is no picture\n" * 20),
    "html called jpg": ("jpg", b"<html><body>404 Not Found</body></html>"),
    "xml called png": ("png", b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'),
    "zip called png": ("png", b"PK\x03\x04" + b"\0" * 100),
    "pdf called jpg": ("jpg", b"%PDF-1.7\n" + b"\0" * 100),
    "elf called png": ("png", b"\x7fELF" + b"\0" * 100),
    "postscript called jpg": ("jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
    "svg called png": ("png", b'<svg xmlns="http://www.w3.org/2000/svg"><image/></svg>'),
    "git lfs pointer": ("png", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    "one line break": ("png", b"\n"),
    "photoshop called jpg": ("jpg", b"8BPS\0\x01" + b"\0" * 100),
    "heic called jpg": ("jpg", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 100),
    "jpeg 2000 called jpg": ("jpg", b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0" * 100),
    "jpeg xl called jpg": ("jpg", b"\xff\x0a" + b"\0" * 100),
    "zeros": ("png", b"\0" * 4096),
    "0xff": ("jpg", b"\xff" * 4096),
}
REFUSED = {**CUTS, **STARTS, **SWAPPED, **BOMBS, **BROKEN}


@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_of_one_such_picture_is_refused_and_the_picture_named(
    sandbox: Any, name: str
) -> None:
    suffix, data = REFUSED[name]
    (sandbox.photos / "good.png").unlink()
    (sandbox.photos / f"hostile.{suffix}").write_bytes(data)
    sentence = sandbox.refuses(f"hostile.{suffix}")
    assert not re.search(r"[<>]|\bb'|0x|Error|object at", sentence)  # no Python terms


NAMES = {
    "latin-1": b"caf\xe9.png",
    "not utf-8": b"\xff\xfe\xfd.png",
    "line break": b"two\nlines.png",
    "escape code": b"\x1b[31mred.png",
    "right to left": "‮gnp.png".encode(),
    "surrogates": b"\xed\xa0\x80.png",
    "long": b"x" * 251 + b".png",
    "spaces": b"   .png",
    "format letters": b"%s%n{0}.png",
    "quotes": b"\"'`$(touch precious)`.png",
}


@pytest.mark.parametrize("name", NAMES)
def test_odd_names_are_shown_and_do_no_harm(sandbox: Any, name: str) -> None:
    (sandbox.photos / "good.png").unlink()
    Path(os.fsdecode(os.path.join(os.fsencode(sandbox.photos), NAMES[name]))).write_bytes(b"no")
    sentence = sandbox.refuses(".png")
    assert "holds no picture to train on" in sentence


@pytest.mark.parametrize("kind", ["fifo", "loop", "dangling", "device", "folder", "socket"])
def test_special_files_are_named_and_never_opened(sandbox: Any, kind: str) -> None:
    (sandbox.photos / "good.png").unlink()
    path = sandbox.photos / "hostile.png"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        os.mknod(path, 0o140644)
    else:
        path.symlink_to({"loop": path, "dangling": "nowhere", "device": "/dev/zero"}[kind])
    sandbox.refuses("hostile.png")


def test_a_folder_link_that_leads_into_itself(sandbox: Any) -> None:
    (sandbox.photos / "good.png").unlink()
    (sandbox.photos / "again").symlink_to(sandbox.photos)
    sandbox.refuses("again")


def test_ten_thousand_files_that_are_none(sandbox: Any) -> None:
    (sandbox.photos / "good.png").unlink()
    for number in range(10_000):
        (sandbox.photos / f"{number:05}.txt").touch()
    assert "00000.txt" in sandbox.refuses(str(sandbox.photos))


def test_ten_thousand_and_one_pictures(sandbox: Any) -> None:
    for number in range(10_000):
        os.link(sandbox.photos / "good.png", sandbox.photos / f"{number:05}.png")
    assert "10001 pictures" in sandbox.refuses(str(sandbox.photos))


@pytest.mark.parametrize("kind", ["missing", "file", "loop", "nul"])
def test_a_training_folder_that_is_none(sandbox: Any, kind: str) -> None:
    path = sandbox.root / "elsewhere"
    if kind == "file":
        path.write_text("x")
    elif kind == "loop":
        path.symlink_to(path)
    sandbox.photos = Path(f"{path}\0") if kind == "nul" else path
    sandbox.refuses("train must be" if kind == "nul" else "elsewhere")


@pytest.mark.parametrize("kind", ["file", "loop", "itself", "fifo"])
def test_class_images_that_are_no_folder(sandbox: Any, kind: str) -> None:
    path = sandbox.photos / "class_data_dir"
    if kind == "file":
        path.write_text("x")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(path if kind == "loop" else sandbox.photos)
    sandbox.refuses("class_data_dir", "--with_prior_preservation")


ODD_BUT_FINE = {
    "cmyk jpeg": ("CMYK", "JPEG"),
    "16-bit grey png": ("I;16", "PNG"),
    "palette png": ("P", "PNG"),
    "1-bit png": ("1", "PNG"),
    "float tiff": ("F", "TIFF"),
    "transparent webp": ("RGBA", "WEBP"),
    "grey and alpha png": ("LA", "PNG"),
    "lab tiff": ("LAB", "TIFF"),
}


@pytest.mark.parametrize("name", ODD_BUT_FINE)
def test_odd_pictures_that_are_whole_are_read(sandbox: Any, name: str) -> None:
    mode, kind = ODD_BUT_FINE[name]
    path = sandbox.photos / "good.png"
    Image.new(mode, (40, 40)).save(path, kind)
    (found,) = dataset_info.read(sandbox.photos).instance_images
    assert images.open_image(found).mode == "RGB"


def test_of_an_animation_the_first_frame_is_read(sandbox: Any) -> None:
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue") * 50]
    path = sandbox.photos / "good.png"
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:])
    (found,) = dataset_info.read(sandbox.photos).instance_images
    assert images.open_image(found).getpixel((5, 5)) == (255, 0, 0)
