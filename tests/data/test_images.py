from __future__ import annotations

import hashlib
import io
import os
import random
import re
import struct
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, features
from PIL.PngImagePlugin import PngInfo

from dreambooth.data import images
from dreambooth.data.picture_files import PictureError
from dreambooth.errors import DatasetError
from dreambooth.limits import LIMITS

# A picture without symmetry: red top left, green top right, blue bottom left, white elsewhere.
CORNERS = {(0, 0): (255, 0, 0), (-1, 0): (0, 255, 0), (0, -1): (0, 0, 255), (-1, -1): (255,) * 3}


def corners(width: int = 48, height: int = 32) -> Image.Image:
    pixels = np.full((height, width, 3), 255, np.uint8)
    pixels[: height // 2, : width // 2] = (255, 0, 0)
    pixels[: height // 2, width // 2 :] = (0, 255, 0)
    pixels[height // 2 :, : width // 2] = (0, 0, 255)
    return Image.fromarray(pixels)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def save(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def assert_upright(image: Image.Image, tolerance: int = 40) -> None:
    assert image.mode == "RGB"
    pixels = np.asarray(image).astype(int)
    for (x, y), colour in CORNERS.items():
        near = pixels[4 if y == 0 else -5, 4 if x == 0 else -5]
        assert abs(near - np.array(colour)).max() <= tolerance, (x, y, near)


# How to store a picture so that EXIF orientation k turns it upright (the inverse transform).
INVERSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif"])
def test_every_exif_orientation_is_applied(tmp_path: Path, orientation: int, suffix: str) -> None:
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = corners()
    if orientation in INVERSE:
        stored = stored.transpose(INVERSE[orientation])
    path = save(stored, tmp_path / f"a.{suffix}", exif=exif)
    opened = images.open_image(path)
    assert opened.size == (48, 32)
    assert_upright(opened)
    assert images.check_image(path) == images.ImageFacts(width=48, height=32)
    assert not opened.info
    assert opened.getexif().get(0x0112, 1) == 1


def test_a_nonsense_orientation_is_ignored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 77
    path = save(corners(), tmp_path / "a.png", exif=exif)
    assert_upright(images.open_image(path))


def test_a_broken_exif_block_does_not_spoil_the_picture(tmp_path: Path) -> None:
    path = save(corners(), tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\x07" * 30)
    assert_upright(images.open_image(path))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "I", "I;16", "F"])
def test_opaque_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (20, 1)))
    if mode in {"I", "I;16"}:
        image = Image.fromarray(np.asarray(ramp).astype(np.uint16) * 257)
        image = image.convert("I") if mode == "I" else image
    elif mode == "F":
        image = Image.fromarray(np.asarray(ramp).astype(np.float32) / 255)
    elif mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        turned = ImageCms.profileToProfile(ramp.convert("RGB"), srgb, lab, outputMode="LAB")
        assert turned is not None
        image = turned
    elif mode == "P":
        image = ramp.convert("P")
    else:
        image = ramp.convert("RGB").convert(mode)
    opened = images.open_image(save(image, tmp_path / "a.tif"))
    assert opened.mode == "RGB"
    grey = np.asarray(opened).astype(int)
    if mode == "1":
        assert grey[0, 0].max() == 0
        assert grey[0, -1].min() == 255
    else:
        assert abs(grey - np.asarray(ramp)[..., None].astype(int)).max() <= 3


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 257, 300, 32768, 65535]], np.uint16)
    expected = [0, 1, 1, 128, 255]
    for name, array in (("a.png", values), ("b.tif", values.astype(">u2"))):
        opened = images.open_image(save(Image.fromarray(array), tmp_path / name))
        assert np.asarray(opened)[0, :, 0].tolist() == expected


def test_sixteen_bit_grey_with_a_transparent_level(tmp_path: Path) -> None:
    values = np.array([[0, 1000, 65535]], np.uint16)
    path = save(Image.fromarray(values), tmp_path / "a.png", transparency=1000)
    assert np.asarray(images.open_image(path))[0, :, 0].tolist() == [0, 255, 255]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 100.0, 255.0], [0, 100, 255]),
        ([0.0, 25700.0, 65535.0], [0, 100, 255]),
        ([-1.0, 0.0, 1.0], [0, 128, 255]),
        ([0.0, float("nan"), 255.0], [0, 0, 255]),
        ([-5.0, -5.0, -5.0], [0, 0, 0]),
    ],
)
def test_floats_are_scaled_by_their_range(
    tmp_path: Path, values: list[float], expected: list[int]
) -> None:
    path = save(Image.fromarray(np.array([values], np.float32)), tmp_path / "a.tif")
    assert np.asarray(images.open_image(path))[0, :, 0].tolist() == expected


def test_sixteen_bit_colour_png(tmp_path: Path) -> None:
    row = b"\0" + struct.pack(">6H", 65535, 0, 0, 0, 32896, 65535)
    data = png(struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0), row)
    (tmp_path / "a.png").write_bytes(data)
    opened = images.open_image(tmp_path / "a.png")
    assert np.asarray(opened)[0].tolist() == [[255, 0, 0], [0, 128, 255]]


def png(header: bytes, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    data = b"\x89PNG\r\n\x1a\n"
    for name, body in ((b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + name + body
        data += struct.pack(">I", zlib.crc32(name + body))
    return data


@pytest.mark.parametrize("depth", [8, 16])
def test_a_colour_key_of_rgb_is_laid_on_white(tmp_path: Path, depth: int) -> None:
    full = 2**depth - 1
    values = [full, 0, 0, 0, full, 0]
    row = b"\0" + struct.pack(f">6{'B' if depth == 8 else 'H'}", *values)
    header = struct.pack(">IIBBBBB", 2, 1, depth, 2, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(png(header, row, (b"tRNS", struct.pack(">3H", 0, full, 0))))
    opened = images.open_image(tmp_path / "a.png")
    assert np.asarray(opened)[0].tolist() == [[255, 0, 0], [255, 255, 255]]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparency_is_laid_on_white(tmp_path: Path, mode: str) -> None:
    rgba = Image.new("RGBA", (8, 4), (0, 0, 0, 0))
    rgba.paste((0, 0, 0, 255), (0, 0, 2, 4))
    rgba.paste((0, 0, 0, 128), (2, 0, 4, 4))
    path = tmp_path / ("a.tif" if mode == "PA" else "a.png")
    if mode == "P":
        image = rgba.quantize(4)
    elif mode == "PA":
        image = rgba.convert("P").convert("PA")
        image.putalpha(rgba.getchannel("A"))
    else:
        image = rgba.convert(mode)
    row = np.asarray(images.open_image(save(image, path)))[0, :, 1].astype(int)
    assert row[0] == 0
    assert abs(row[3] - 127) <= 2
    assert row[7] == 255


def test_a_transparent_gif_and_its_first_frame(tmp_path: Path) -> None:
    first = Image.new("P", (10, 10), 0)
    first.putpalette([0, 0, 0, 255, 0, 0] + [0] * 762)
    first.paste(1, (0, 0, 5, 10))
    second = Image.new("P", (10, 10), 0)
    second.putpalette([0, 0, 255] * 256)
    path = save(
        first,
        tmp_path / "a.gif",
        save_all=True,
        append_images=[second],
        transparency=0,
        duration=50,
    )
    opened = images.open_image(path)
    assert opened.getpixel((1, 1)) == (255, 0, 0)
    assert opened.getpixel((8, 8)) == (255, 255, 255)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_the_first_frame_of_animations_is_read(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    options: dict[str, object] = {"lossless": True} if suffix == "webp" else {}
    path = save(
        frames[0], tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **options
    )
    assert images.open_image(path).getpixel((8, 8)) == (255, 0, 0)


def test_multi_picture_jpegs_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    corners().save(path, "MPO", save_all=True, append_images=[Image.new("RGB", (48, 32))])
    assert_upright(images.open_image(path))
    assert images.check_image(path) == images.ImageFacts(width=48, height=32)


def test_the_content_counts_not_the_suffix(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    corners().save(path, "PNG")
    assert_upright(images.open_image(path), tolerance=0)
    bare = tmp_path / "bare"
    corners().save(bare, "WEBP", lossless=True)
    assert_upright(images.open_image(bare), tolerance=0)


@pytest.mark.parametrize("kind", ["EPS", "PDF", "PPM", "TGA", "ICO", "SGI", "JPEG2000"])
def test_formats_off_the_list_are_never_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.png"
    corners().save(path, kind)
    with pytest.raises(DatasetError, match=r"a\.png"):
        images.open_image(path)


ENCODINGS: list[tuple[str, dict[str, object]]] = [
    ("JPEG", {}),
    ("JPEG", {"progressive": True}),
    ("PNG", {}),
    ("WEBP", {}),
    ("BMP", {}),
    ("GIF", {}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
]


def encoded(kind: str, options: dict[str, object], size: tuple[int, int] = (90, 70)) -> bytes:
    buffer = io.BytesIO()
    noise(*size).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(("kind", "options"), ENCODINGS)
@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_truncated_pictures_are_named(
    tmp_path: Path, kind: str, options: dict[str, object], keep: float
) -> None:
    data = encoded(kind, options)
    path = tmp_path / "half.bin"
    path.write_bytes(data[: int(len(data) * keep)])
    for read in (images.open_image, images.check_image):
        with pytest.raises(DatasetError, match=r"half\.bin") as caught:
            read(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff\xd8\xff", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"II*\0", b"<html></html>", b"B"],
)
def test_stubs_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "stub.png"
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=r"stub\.png"):
        images.open_image(path)


@settings(max_examples=150, deadline=None)
@given(
    encoding=st.sampled_from(ENCODINGS),
    flips=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=12),
)
def test_flipped_bytes_give_a_picture_or_a_named_error(
    tmp_path_factory: pytest.TempPathFactory,
    encoding: tuple[str, dict[str, object]],
    flips: list[tuple[float, int]],
) -> None:
    data = bytearray(encoded(*encoding, size=(24, 20)))
    for place, value in flips:
        data[int(place * (len(data) - 1))] = value
    path = tmp_path_factory.getbasetemp() / "flipped"
    path.write_bytes(data)
    try:
        outcome = images.open_image(path).mode
    except DatasetError as error:
        outcome = str(error)
    assert outcome == "RGB" or "flipped" in outcome


def test_a_decompression_bomb_is_refused_before_decoding(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    header = struct.pack(">IIBBBBB", 40_000, 40_000, 1, 0, 0, 0, 0)
    path.write_bytes(png(header, b"\0" * 1000))
    for read in (images.open_image, images.check_image):
        with pytest.raises(DatasetError, match=r"bomb\.png.*pixels"):
            read(path)


def test_our_own_pixel_limit_rules_and_pillows_is_left_alone(tmp_path: Path) -> None:
    before = Image.MAX_IMAGE_PIXELS
    path = save(noise(100, 100), tmp_path / "a.png")
    with pytest.raises(DatasetError, match=r"a\.png is 100 x 100, more than the 9999 pixels"):
        images.open_image(path, limits=replace(LIMITS, max_image_pixels=9_999))
    assert (
        images.open_image(path, limits=replace(LIMITS, max_image_pixels=10_000)).size == (100,) * 2
    )
    with pytest.raises(DatasetError, match="side above the 99 pixels"):
        images.check_image(path, limits=replace(LIMITS, max_image_side_pixels=99))
    assert before == Image.MAX_IMAGE_PIXELS


def test_pillows_size_warning_is_neither_shown_nor_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6_000)
    path = save(noise(100, 100), tmp_path / "a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert images.open_image(path).size == (100, 100)
        assert images.check_images([path]) == [images.ImageFacts(width=100, height=100)]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000)
    with pytest.raises(DatasetError, match=r"a\.png has too many pixels"):
        images.open_image(path)


def test_large_files_are_not_read(tmp_path: Path) -> None:
    path = save(noise(10, 10), tmp_path / "a.png")
    with pytest.raises(DatasetError, match=r"a\.png has .* bytes, more than the 50 allowed"):
        images.open_image(path, limits=replace(LIMITS, max_image_file_bytes=50))


def test_special_files_neither_hang_nor_open(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "dir.png").mkdir()
    for name in ("pipe.png", "loop.png", "gone.png", "dir.png", "missing.png"):
        with pytest.raises(DatasetError, match=name):
            images.open_image(tmp_path / name)
    with pytest.raises(DatasetError, match="not a regular file"):
        images.open_image(Path("/dev/zero"))


def test_a_link_to_a_picture_is_a_picture(tmp_path: Path) -> None:
    path = save(corners(), tmp_path / "a.png")
    link = tmp_path / "link.png"
    link.symlink_to(path)
    assert_upright(images.open_image(link))


def test_check_images_keeps_order_and_returns_faults(tmp_path: Path) -> None:
    paths = [save(noise(10 + i, 20), tmp_path / f"{i}.jpg") for i in range(9)]
    paths[4].write_bytes(b"\xff\xd8\xff\xe0 nothing")
    results = images.check_images(paths)
    assert isinstance(results[4], PictureError)
    assert results[4].path == paths[4]
    assert [r.width for r in results if isinstance(r, images.ImageFacts)] == [
        10, 11, 12, 13, 15, 16, 17, 18,
    ]  # fmt: skip


@pytest.mark.parametrize("megapixels", [0.01, 3])
def test_right_checksums_around_a_broken_stream_are_not_enough(
    tmp_path: Path, megapixels: float
) -> None:
    side = int((megapixels * 1e6) ** 0.5)
    whole = png(struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0), bytes((side + 1) * side))
    start = whole.index(b"IDAT")
    (length,) = struct.unpack(">I", whole[start - 4 : start])
    body = whole[start + 4 : start + 4 + length // 2] + b"\xff" * (length - length // 2)
    crc = struct.pack(">I", zlib.crc32(b"IDAT" + body))
    path = tmp_path / "a.png"
    path.write_bytes(whole[: start + 4] + body + crc + whole[start + 8 + length :])
    for read in (images.open_image, images.check_image):
        with pytest.raises(PictureError, match=r"a\.png is damaged"):
            read(path)


@given(
    width=st.integers(1, 5000),
    height=st.integers(1, 5000),
    resolution=st.sampled_from([8, 64, 512]),
)
def test_resized_size_brings_the_short_side_to_the_resolution(
    width: int, height: int, resolution: int
) -> None:
    new_width, new_height = images.resized_size(width, height, resolution)
    assert min(new_width, new_height) == resolution
    assert (new_width >= new_height) == (width >= height) or new_width == new_height
    assert max(new_width, new_height) <= resolution * images.MAX_SHAPE_RATIO
    if max(width, height) <= images.MAX_SHAPE_RATIO * min(width, height):
        assert max(new_width, new_height) == int(
            resolution * max(width, height) / min(width, height)
        )


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (40, 100), (64, 64), (1, 1), (7, 900)])
def test_resize_gives_the_size_that_resized_size_promises(size: tuple[int, int]) -> None:
    assert images.resize(noise(*size), 64).size == images.resized_size(*size, 64)


def test_resize_is_pillows_antialiased_bilinear() -> None:
    image = noise(300, 200)
    expected = image.resize((96, 64), Image.Resampling.BILINEAR)
    assert np.array_equal(np.asarray(images.resize(image, 64)), np.asarray(expected))
    fine = Image.fromarray(np.indices((256, 256)).sum(0).astype(np.uint8) % 2 * 255).convert("RGB")
    assert np.asarray(images.resize(fine, 64)).std() < 3  # a checkerboard becomes an even grey


def test_a_picture_of_the_right_size_is_left_alone() -> None:
    image = noise(64, 64)
    assert images.resize(image, 64) is image


def test_a_very_long_strip_does_not_explode() -> None:
    assert images.resize(noise(2, 40_000), 64).size == (64, 64 * images.MAX_SHAPE_RATIO)


def test_the_centre_crop_is_torchvisions() -> None:
    rng = random.Random(0)
    state = rng.getstate()
    assert images.crop_offsets((512, 683), 512, center=True, random=rng) == (0, 86)
    assert images.crop_offsets((513, 512), 512, center=True, random=rng) == (0, 0)
    assert images.crop_offsets((515, 512), 512, center=True, random=rng) == (2, 0)
    assert rng.getstate() == state


def test_random_crops_stay_inside_and_reach_both_ends() -> None:
    rng = random.Random(0)
    found = {images.crop_offsets((68, 64), 64, center=False, random=rng) for _ in range(200)}
    assert found == {(left, 0) for left in range(5)}


def test_random_crops_follow_the_generator() -> None:
    first = [images.crop_offsets((90, 80), 64, center=False, random=random.Random(3)) for _ in "ab"]
    assert first[0] == first[1]


def test_a_crop_that_does_not_fit_is_our_own_fault() -> None:
    with pytest.raises(ValueError, match="no square"):
        images.crop_offsets((60, 80), 64, center=True, random=random.Random(0))


def test_to_array_gives_writable_pixels() -> None:
    array = images.to_array(corners())
    assert array.shape == (32, 48, 3)
    assert array.dtype == np.uint8
    array[0, 0] = 7


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((512, 512), None),
        ((2000, 1001), None),
        ((1000, 512), None),
        ((400, 700), "is 400 x 700 pixels: its short side is enlarged to 512"),
        ((600, 1300), "is 600 x 1300 pixels: a square crop keeps only 46 %"),
        ((1600, 80_000), "a square crop keeps only 2 % of it"),
        ((1000, 100_001), "a square crop keeps less than 1 % of it"),
        ((100, 400), "enlarged to 512 pixels, which teaches blur .* and a square crop .* 25 %"),
    ],
)
def test_warnings_tell_small_and_strange_pictures(size: tuple[int, int], words: str | None) -> None:
    told = images.warnings_for(*size, 512)
    if words is None:
        assert told is None
    else:
        assert told is not None
        assert re.search(words, told)


def test_a_note_is_read_back_from_a_png(tmp_path: Path) -> None:
    info = PngInfo()
    info.add_text("key", "value")
    path = save(corners(), tmp_path / "a.png", pnginfo=info)
    assert images.read_note(path, "key") == "value"
    assert images.read_note(path, "other") is None


def test_a_picture_that_has_changed_since_its_check_is_refused(tmp_path: Path) -> None:
    path = save(corners(), tmp_path / "a.png")
    facts = images.check_image(path)
    assert facts.sha256 == hashlib.sha256(path.read_bytes()).digest()
    assert np.array_equal(
        images.open_image(path, sha256=facts.sha256), np.asarray(images.open_image(path))
    )
    save(noise(48, 32), path)
    with pytest.raises(PictureError, match="has changed since the job began"):
        images.open_image(path, sha256=facts.sha256)
