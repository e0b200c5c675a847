"""Decode a picture file safely into upright RGB, and resize and crop it for training.

Files are untrusted: only the decoder that the first bytes call for is tried, oversized pictures
are refused from their header, and every error of a decoder becomes a `PictureError` that names the
file. Legend: H W pixels, uint8 0..255.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import io
import os
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt

# The three plugins are imported so that Pillow need not load all of its some 40 plugins for them.
from PIL import (
    AvifImagePlugin,  # noqa: F401
    Image,
    ImageFile,
    TiffImagePlugin,  # noqa: F401
    WebPImagePlugin,  # noqa: F401
    _imaging,
)

from dreambooth.data.colour_profiles import to_srgb
from dreambooth.data.picture_files import (
    FORMATS,
    FORMATS_TEXT,
    NotAPictureError,
    PictureError,
    format_of,
    opened,
    why,
)
from dreambooth.data.picture_structure import why_slow
from dreambooth.limits import LIMITS, Limits

Pixels = npt.NDArray[np.uint8]
T = TypeVar("T")

MAX_SHAPE_RATIO = 32
"""Of a picture longer than this times its short side only the middle is resized (memory)."""

_STRANGE_RATIO = 2.0  # above it a square crop loses more than half of the picture
_CORNER = 16  # pixels a side
_MOST_LIBTIFF_BYTES = 200  # of a message
_CHECK_THREADS = 4  # Pillow's decoders release the interpreter lock

# What Pillow's decoders are known to raise on damaged or hostile files.
_DECODER_FAULTS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    RuntimeError,
    EOFError,
    struct.error,
    zlib.error,
)

# EXIF 2.3, tag 0x0112: how the stored picture must be turned to be upright.
_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFacts:
    """A picture that was checked: its upright size in pixels, and the SHA-256 of its file."""

    width: int
    height: int
    sha256: bytes = field(default=b"", compare=False)


def open_image(path: Path, *, sha256: bytes | None = None, limits: Limits = LIMITS) -> Image.Image:
    """Decode a picture: mode RGB, upright, transparency on white, first frame of animations.

    16-bit pictures are scaled (65535 -> 255), not clipped; an embedded colour profile other than
    sRGB is converted. sha256: that of the file when it was checked. Raises PictureError (a
    DatasetError), which names the file, if it is no picture, damaged, truncated or too large, or
    has changed since the check.
    """
    with _quiet(), opened(path, limits=limits) as file:
        content: BinaryIO = file
        if sha256 is not None:
            content = io.BytesIO(file.read())
            if hashlib.sha256(content.getbuffer()).digest() != sha256:
                raise PictureError(path, "has changed since the job began")
        return _decoded(content, path, limits, lambda image: _upright_rgb(image, limits))


def open_transparency(path: Path, *, limits: Limits = LIMITS) -> Image.Image | None:
    """Return how opaque each pixel is, mode L, 0..255, upright; None for a picture without alpha.

    Raises PictureError as `open_image` does.
    """

    def opacity(image: ImageFile.ImageFile) -> Image.Image | None:
        image.load()
        if not image.has_transparency_data or image.mode in {"I", "F"} or ";16" in image.mode:
            return None
        plain = image.convert("LA") if image.mode == "La" else image
        found = plain.convert("RGBA").getchannel("A")
        turn = _TURNS.get(_orientation(image))
        return found if turn is None else found.transpose(turn)

    with _quiet(), opened(path, limits=limits) as file:
        return _decoded(file, path, limits, opacity)


def check_image(path: Path, *, limits: Limits = LIMITS) -> ImageFacts:
    """Return the size and the hash of a picture, after checking that it decodes.

    JPEGs are decoded at an eighth of their size (30 ms for 12 megapixels), all others in full
    (0.2 s for a PNG of 12 megapixels), because checksums may be right around a broken stream.
    Raises PictureError as `open_image` does.
    """
    with _quiet():
        return _checked(path, limits)


def check_images(
    paths: Sequence[Path], *, limits: Limits = LIMITS
) -> list[ImageFacts | PictureError]:
    """Check many files in parallel; return facts and errors in the order given, raising nothing."""

    def check(path: Path) -> ImageFacts | PictureError:
        try:
            return _checked(path, limits)
        except PictureError as error:
            return error

    with _quiet(), ThreadPoolExecutor(max_workers=_CHECK_THREADS) as pool:
        return list(pool.map(check, paths))


def read_note(path: Path, key: str, *, limits: Limits = LIMITS) -> str | None:
    """Return the text that a PNG, which must decode, carries in front of its pixels; None if none.

    Raises PictureError as `open_image` does.
    """

    def find(image: ImageFile.ImageFile) -> str | None:
        note = image.info.get(key)  # before the pixels are read, which may add text from behind
        image.load()
        return str(note) if isinstance(note, str) else None

    with _quiet(), opened(path, limits=limits) as file:
        return _decoded(file, path, limits, find)


def resized_size(width: int, height: int, resolution: int) -> tuple[int, int]:
    """Return (width, height) with the short side at `resolution`, the long side rounded down.

    This is the rule of torchvision's `Resize(int)`, which the original scripts use, but the long
    side is at most MAX_SHAPE_RATIO times the short one.
    """
    short, long = min(width, height), max(width, height)
    long = min(int(resolution * long / short), resolution * MAX_SHAPE_RATIO)
    return (resolution, long) if width <= height else (long, resolution)


def resize(image: Image.Image, resolution: int) -> Image.Image:
    """Resize to `resized_size`: bilinear, antialiased when shrinking, like the original scripts."""
    width, height = image.size
    size = resized_size(width, height, resolution)
    if size == image.size:
        return image
    longest = MAX_SHAPE_RATIO * min(width, height)
    left, top = max(0, width - longest) / 2, max(0, height - longest) / 2
    box = (left, top, width - left, height - top)
    return image.resize(size, Image.Resampling.BILINEAR, box=box)


def crop_offsets(
    size: tuple[int, int], resolution: int, *, center: bool, random: Random
) -> tuple[int, int]:
    """Return (left, top) of a square of side `resolution` in a picture of size (width, height).

    It is central or uniformly random, as in torchvision's CenterCrop and RandomCrop; a centre crop
    does not use `random`. Raises ValueError if the picture is smaller than the square.
    """
    spare_x, spare_y = size[0] - resolution, size[1] - resolution
    if spare_x < 0 or spare_y < 0:
        raise ValueError(f"no square of side {resolution} fits into {size[0]} x {size[1]}")
    if center:
        return round(spare_x / 2), round(spare_y / 2)
    top, left = random.randint(0, spare_y), random.randint(0, spare_x)
    return left, top


def to_array(image: Image.Image) -> Pixels:
    """Return a copy of a picture's pixels as RGB, uint8 [H,W,3], 0..255."""
    return np.array(image.convert("RGB"), dtype=np.uint8)


def warnings_for(width: int, height: int, resolution: int) -> str | None:
    """Return in words what makes this size bad for training, or None if nothing does.

    The text continues a sentence that begins with the picture's name: "is 300 x 200 pixels: ...".
    """
    short, long = min(width, height), max(width, height)
    faults = []
    if short < resolution:
        faults.append(
            f"its short side is enlarged to {resolution} pixels, which teaches blur "
            "(use a larger picture)"
        )
    if long > _STRANGE_RATIO * short:
        kept = 100 * short // long  # rounded down, so as not to claim more than is kept
        faults.append(
            f"a square crop keeps {f'only {kept}' if kept else 'less than 1'} % of it "
            "(crop it around the subject yourself)"
        )
    return f"is {width} x {height} pixels: {' and '.join(faults)}" if faults else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence Pillow's warnings (odd EXIF, sizes); those that matter become errors here."""
    _keep_libtiff_quiet()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _LibtiffSaid(threading.local):
    """The first error that libtiff reported of the picture which this thread decodes."""

    first: str | None = None


_libtiff_said = _LibtiffSaid()


def _keep_first(_: bytes, template: bytes, values: int) -> None:
    """Take an error from libtiff, as the arguments of C's vprintf."""
    if _libtiff_said.first is None:
        text = ctypes.create_string_buffer(_MOST_LIBTIFF_BYTES)
        say = ctypes.CDLL(None).vsnprintf
        say(text, ctypes.c_size_t(len(text)), ctypes.c_char_p(template), ctypes.c_void_p(values))
        _libtiff_said.first = text.value.decode("utf-8", errors="replace").rstrip(". :\n")


_LIBTIFF_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)(
    _keep_first
)


@functools.cache
def _keep_libtiff_quiet() -> None:
    """Take libtiff's errors, which it would print: one per line of pixels, a megabyte a picture.

    No other decoder of ours prints anything.
    """
    with contextlib.suppress(OSError, AttributeError):  # a Pillow that has no libtiff, or hides it
        ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(_LIBTIFF_HANDLER)


def _checked(path: Path, limits: Limits) -> ImageFacts:
    with opened(path, limits=limits) as file:
        facts = _decoded(file, path, limits, lambda image: _facts(image, limits))
        file.seek(0)
        return replace(facts, sha256=hashlib.file_digest(file, "sha256").digest())


def _decoded(
    file: BinaryIO, path: Path, limits: Limits, finish: Callable[[ImageFile.ImageFile], T]
) -> T:
    """Open a file by its content, check the size in its header, then let `finish` decode it."""
    kind = format_of(file)
    if kind is None:
        empty = file.seek(0, os.SEEK_END) == 0
        raise NotAPictureError(path, "is empty" if empty else "holds no known picture format")
    if kind not in FORMATS:
        raise PictureError(path, f"is in {kind} format (save it as one of {FORMATS_TEXT})")
    if (slow := why_slow(file, kind, limits)) is not None:
        raise PictureError(path, f"{slow}, which would take too long to decode (save it anew)")
    _libtiff_said.first = None
    try:
        with Image.open(file, formats=(kind,)) as image:
            _refuse_bomb(path, *image.size, limits)
            found = finish(image)
    except Image.DecompressionBombError as error:
        raise PictureError(path, "has too many pixels to be opened safely") from error
    except MemoryError as error:
        raise PictureError(path, "needs more memory than there is") from error
    except _DECODER_FAULTS as error:
        raise PictureError(path, f"is damaged ({_libtiff_said.first or why(error)})") from error
    if _libtiff_said.first is not None:  # some of its decoders go on with any pixels
        raise PictureError(path, f"is damaged ({_libtiff_said.first})")
    return found


def _refuse_bomb(path: Path, width: int, height: int, limits: Limits) -> None:
    if width < 1 or height < 1:
        raise PictureError(path, "has no pixels")
    if width * height > limits.max_image_pixels:
        cap = limits.max_image_pixels
        raise PictureError(path, f"is {width} x {height}, more than the {cap} pixels allowed")
    if max(width, height) > limits.max_image_side_pixels:
        cap = limits.max_image_side_pixels
        raise PictureError(path, f"is {width} x {height}, a side above the {cap} pixels allowed")


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation 1..8 of a loaded picture; 1 if it is missing or invalid."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except _DECODER_FAULTS:  # a broken EXIF block does not harm the pixels
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


def _facts(image: ImageFile.ImageFile, limits: Limits) -> ImageFacts:
    width, height = image.size
    drafted = image.draft("RGB", (1, 1)) is not None  # only JPEG can be decoded at reduced size
    image.load()
    if not drafted:
        width, height = image.size  # Pillow turns a TIFF upright while loading it
    if _orientation(image) >= 5:
        width, height = height, width
    # Training's own conversion, of a corner: that of all of it would take several times its memory.
    corner = image.crop((0, 0, min(image.width, _CORNER), min(image.height, _CORNER)))
    corner.palette = image.palette  # `crop` makes one up where there is none
    _upright_rgb(corner, limits)
    return ImageFacts(width=width, height=height)


def _upright_rgb(image: Image.Image, limits: Limits) -> Image.Image:
    image.load()
    turn = _TURNS.get(_orientation(image))
    rgb = to_srgb(_rgb(image), image, limits=limits)
    if turn is not None:
        rgb = rgb.transpose(turn)
    rgb.info.clear()  # so that nobody turns it again or saves its profile
    return rgb


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in {"I", "F"} or image.mode.startswith("I;16"):
        return _deep_to_rgb(image)
    if image.mode == "La":  # premultiplied grey can be converted to LA only
        image = image.convert("LA")
    if not image.has_transparency_data:
        return image.convert("RGB")
    upper = image.convert("RGBA")
    white = Image.new("RGBA", upper.size, "white")
    white.alpha_composite(upper)
    return white.convert("RGB")


def _deep_to_rgb(image: Image.Image) -> Image.Image:
    """Convert grey of more than 8 bits to RGB; one level may be declared transparent (PNG tRNS)."""
    values = np.asarray(image)
    grey = _eight_bits(values)
    level = image.info.get("transparency")
    if isinstance(level, int):
        grey = np.where(values == level, np.uint8(255), grey)
    return Image.fromarray(grey).convert("RGB")


def _eight_bits(values: npt.NDArray[np.generic]) -> Pixels:
    """Scale grey levels to uint8 0..255.

    Unsigned 16-bit levels are divided by 257. Of all others, NaN and infinity count as 0; levels
    beyond 0..65535 are scaled from minimum to maximum, floats up to 1 multiplied by 255, levels up
    to 255 kept, and the rest divided by 257.
    """
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    real: npt.NDArray[np.float32] = np.nan_to_num(
        values.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0
    )
    low, high = float(real.min()), float(real.max())
    if low < 0 or high > 65535:
        real = (real - np.float32(low)) * np.float32(255 / max(high - low, 1.0))
    elif values.dtype.kind == "f" and high <= 1:
        real = real * np.float32(255)
    elif high > 255:
        real = real / np.float32(257)
    return np.rint(real).astype(np.uint8)
