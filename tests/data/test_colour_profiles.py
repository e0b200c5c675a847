"""Embedded colour profiles, built here from their numbers in the layout of ICC.1."""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from dreambooth.data import images
from dreambooth.limits import LIMITS

WHITE = (0.9642, 1.0, 0.8249)  # D50, the white point of all profiles
# Columns of the matrix from red, green and blue to XYZ (D50).
SRGB = ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))
DISPLAY_P3 = ((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841))
# Parameters of the curve of IEC 61966-2-1 (parametricCurveType 3 of ICC.1).
SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)


def fixed(*values: float) -> bytes:
    """Return numbers as ICC.1's s15Fixed16Number."""
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def profile(space: bytes, tags: Mapping[bytes, bytes], connection: bytes = b"XYZ ") -> bytes:
    """Return a profile of these tags: a printer's for CMYK, else a display's."""
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    told = {
        b"desc": text("made for a test"),
        b"cprt": text("none"),
        b"wtpt": b"XYZ \0\0\0\0" + fixed(*WHITE),
        **tags,
    }
    head, body = struct.pack(">I", len(told)), b""
    for name, content in told.items():
        offset = 128 + 4 + 12 * len(told) + len(body)
        head += name + struct.pack(">II", offset, len(content))
        body += content + b"\0" * (-len(content) % 4)
    size = struct.pack(">I", 128 + len(head) + len(body))
    header = size + b"lcms" + b"\x04\x30\0\0" + kind + space + connection + b"\0" * 12 + b"acsp"
    header = header.ljust(68, b"\0") + fixed(*WHITE)
    return header.ljust(128, b"\0") + head + body


def text(words: str) -> bytes:
    """Return a multiLocalizedUnicodeType with one text."""
    data = words.encode("utf-16-be")
    return b"mluc\0\0\0\0" + struct.pack(">II2s2sII", 1, 12, b"en", b"US", len(data), 28) + data


def display(columns: tuple[tuple[float, ...], ...]) -> bytes:
    curve = b"para\0\0\0\0\0\3\0\0" + fixed(*SRGB_CURVE)
    tags = dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns, strict=True):
        tags[name] = b"XYZ \0\0\0\0" + fixed(*column)
    return profile(b"RGB ", tags)


def grey(gamma: float) -> bytes:
    return profile(b"GRAY", {b"kTRC": b"para\0\0\0\0\0\0\0\0" + fixed(gamma)})


def print_() -> bytes:
    """Return a CMYK profile with a table of 2^4 points.

    Every ink takes the same share of the light and has no colour.
    """
    grid = b""
    for inks in product((0, 1), repeat=4):
        lightness = 255 * max(0.0, 1 - sum(inks) / 4)
        grid += bytes((round(lightness), 128, 128))
    straight = bytes(range(256))
    table = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    table += straight * 4 + grid + straight * 3
    return profile(b"CMYK", {b"A2B0": table, b"A2B1": table}, b"Lab ")


def shades(mode: str = "RGB") -> Image.Image:
    generator = np.random.default_rng(0)
    bands = {"L": 1, "LA": 2, "CMYK": 4}.get(mode, len(mode))
    pixels = generator.integers(0, 256, (24, 32, bands), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(), mode)


def opened(image: Image.Image, path: Path, icc_profile: bytes | None, **limits: int) -> np.ndarray:
    image.save(path, icc_profile=icc_profile, **({"lossless": True} if "webp" in path.name else {}))
    return np.asarray(images.open_image(path, limits=replace(LIMITS, **limits)))


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp", "avif"])
def test_display_p3_becomes_srgb(tmp_path: Path, suffix: str) -> None:
    colours = [(200, 100, 100), (120, 160, 110), (90, 90, 180), (128, 128, 128)]
    for number, stored in enumerate(colours):
        plain = Image.new("RGB", (32, 32), stored)
        shown = opened(plain, tmp_path / f"{number}.{suffix}", display(DISPLAY_P3))
        assert abs(shown[16, 16].astype(int) - expected(stored)).max() <= 4


def expected(stored: tuple[int, ...]) -> np.ndarray:
    """Convert Display P3 to sRGB by the definitions of both."""
    value = np.array(stored) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    linear = np.linalg.solve(np.array(SRGB).T, np.array(DISPLAY_P3).T @ linear).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def test_white_and_black_stay(tmp_path: Path) -> None:
    for name, colour in (("white", 255), ("black", 0)):
        plain = Image.new("RGB", (8, 8), (colour,) * 3)
        assert (opened(plain, tmp_path / f"{name}.png", display(DISPLAY_P3)) == colour).all()


def test_pictures_without_a_profile_or_with_srgb_stay_bit_for_bit(tmp_path: Path) -> None:
    built_in = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for number, icc_profile in enumerate((None, built_in, display(SRGB))):
        shown = opened(shades(), tmp_path / f"{number}.png", icc_profile)
        assert np.array_equal(shown, np.asarray(shades()))


def test_transparent_pictures_and_palettes_are_converted_too(tmp_path: Path) -> None:
    plain = opened(shades(), tmp_path / "a.png", display(DISPLAY_P3))
    opaque = shades().convert("RGBA")
    assert np.array_equal(opened(opaque, tmp_path / "b.png", display(DISPLAY_P3)), plain)
    palette = shades().convert("P")
    of_palette = opened(palette.convert("RGB"), tmp_path / "c.png", display(DISPLAY_P3))
    assert np.array_equal(opened(palette, tmp_path / "d.png", display(DISPLAY_P3)), of_palette)


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_grey_is_converted(tmp_path: Path, mode: str) -> None:
    image = Image.new(mode, (8, 8), 128 if mode == "L" else (128, 255))
    shown = opened(image, tmp_path / "a.png", grey(1.0))
    assert abs(int(shown[4, 4, 0]) - 188) <= 2  # half the light
    assert (shown == shown[4, 4, 0]).all()


def test_print_colours_are_converted(tmp_path: Path) -> None:
    image = Image.new("CMYK", (8, 8), (128, 128, 128, 128))
    plain = opened(image, tmp_path / "a.tif", None)
    assert abs(int(plain[4, 4, 0]) - 63) <= 1
    shown = opened(image, tmp_path / "b.tif", print_())
    assert abs(int(shown[4, 4, 0]) - 118) <= 4  # L* of 50


def test_profiles_that_cannot_be_used_are_ignored(tmp_path: Path) -> None:
    whole = display(DISPLAY_P3)
    damaged = [b"x", b"\0" * 200, whole[:100], whole[:300], whole[:128] + b"\xff" * 400]
    damaged += [print_(), grey(1.0), whole.replace(b"rXYZ", b"xxxx")]
    for number, icc_profile in enumerate(damaged):
        path = tmp_path / f"{number}.png"
        assert np.array_equal(opened(shades(), path, icc_profile), np.asarray(shades())), number
    grey_picture = shades("L")
    shown = opened(grey_picture, tmp_path / "grey.png", whole)
    assert np.array_equal(shown, np.asarray(grey_picture.convert("RGB")))


def test_a_profile_above_the_cap_is_ignored(tmp_path: Path) -> None:
    data = display(DISPLAY_P3)
    for cap, changed in ((len(data), True), (len(data) - 1, False)):
        shown = opened(shades(), tmp_path / "a.png", data, max_colour_profile_bytes=cap)
        assert np.array_equal(shown, np.asarray(shades())) != changed


def test_any_flipped_byte_of_a_profile_does_no_harm(tmp_path: Path) -> None:
    data = bytearray(display(DISPLAY_P3))
    generator = np.random.default_rng(0)
    for _ in range(200):
        bad = bytearray(data)
        for at in generator.integers(0, len(bad), 4):
            bad[at] = generator.integers(0, 256)
        assert opened(shades(), tmp_path / "a.png", bytes(bad)).shape == (24, 32, 3)


def test_orientation_and_profile_go_together(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    shades().save(buffer, "PNG", exif=exif, icc_profile=display(DISPLAY_P3))
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    shown = images.open_image(tmp_path / "a.png")
    upright = opened(shades(), tmp_path / "b.png", display(DISPLAY_P3))
    assert np.array_equal(np.asarray(shown), np.rot90(upright, -1))
    assert "icc_profile" not in shown.info
