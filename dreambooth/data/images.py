"""One picture file -> an upright RGB picture, safely; the resize and crop that training uses.

Files come from strangers: only the decoder that the first bytes ask for is tried, oversized
pictures are refused from their header, and every fault of a decoder becomes a `PictureError`
that names the file. Legend: H W pixels, uint8 0..255.
"""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TypeVar

import numpy as np
import numpy.typing as npt

# The last three are imported so that Pillow need not load all of its some 40 plugins for them.
from PIL import (
    AvifImagePlugin,  # noqa: F401
    Image,
    ImageFile,
    TiffImagePlugin,  # noqa: F401
    WebPImagePlugin,  # noqa: F401
)

from dreambooth.data.colour_profiles import to_srgb
from dreambooth.data.picture_files import (
    FORMATS,
    FORMATS_TEXT,
    PictureError,
    format_of,
    opened,
    why,
)
from dreambooth.limits import LIMITS, Limits

Pixels = npt.NDArray[np.uint8]
T = TypeVar("T")

MAX_SHAPE_RATIO = 32
"""Of a picture longer than this times its short side only the middle is resized (memory)."""

_STRANGE_RATIO = 2.0  # from here on a square crop loses more than half of the picture
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

# EXIF 2.3, tag 0x0112: how the stored picture must be turned to stand upright.
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
    """What the plan needs to know of a picture: its size in pixels once it stands upright."""

    width: int
    height: int


def open_image(path: Path, *, limits: Limits = LIMITS) -> Image.Image:
    """Decode a picture: mode RGB, upright, transparency on white, first frame of animations.

    16-bit pictures are scaled (65535 -> 255), not clipped; an embedded colour profile other than
    sRGB is converted. Raises PictureError (a DatasetError) that names the file: no picture,
    damaged, truncated, too large.
    """
    with _quiet():
        return _decoded(path, limits, lambda image: _upright_rgb(image, limits))


def check_image(path: Path, *, limits: Limits = LIMITS) -> ImageFacts:
    """Size of a picture, after proving that it decodes.

    JPEGs are decoded at an eighth of their size (30 ms for 12 megapixels), all others in full (a
    PNG of 12 megapixels: 0.2 s): checksums may well be right around a broken stream.
    Raises PictureError as `open_image` does.
    """
    with _quiet():
        return _decoded(path, limits, _facts)


def check_images(
    paths: Sequence[Path], *, limits: Limits = LIMITS
) -> list[ImageFacts | PictureError]:
    """`check_image` of many files at once; in the order given, faults returned, not raised."""

    def check(path: Path) -> ImageFacts | PictureError:
        try:
            return _decoded(path, limits, _facts)
        except PictureError as error:
            return error

    with _quiet(), ThreadPoolExecutor(max_workers=_CHECK_THREADS) as pool:
        return list(pool.map(check, paths))


def read_note(path: Path, key: str, *, limits: Limits = LIMITS) -> str | None:
    """The text that a PNG carries under a key in front of its pixels, None where it has none.

    Raises PictureError as `open_image` does.
    """

    def find(image: ImageFile.ImageFile) -> str | None:
        note = image.info.get(key)
        return str(note) if isinstance(note, str) else None

    with _quiet():
        return _decoded(path, limits, find)


def resized_size(width: int, height: int, resolution: int) -> tuple[int, int]:
    """Size (width, height) with the short side at `resolution`, the long side cut down to int.

    The rule of torchvision's `Resize(int)`, which the original scripts use. The long side ends
    at MAX_SHAPE_RATIO times the short one.
    """
    short, long = min(width, height), max(width, height)
    long = min(int(resolution * long / short), resolution * MAX_SHAPE_RATIO)
    return (resolution, long) if width <= height else (long, resolution)


def resize(image: Image.Image, resolution: int) -> Image.Image:
    """Resize to `resized_size`: bilinear, antialiased when shrinking, as the originals do."""
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
    """(left, top) of a square of side `resolution` in a picture of size (width, height).

    Centre or uniformly random, as torchvision's CenterCrop and RandomCrop choose; `random` is
    left untouched for a centre crop.
    """
    spare_x, spare_y = size[0] - resolution, size[1] - resolution
    if spare_x < 0 or spare_y < 0:
        raise ValueError(f"no square of side {resolution} fits into {size[0]} x {size[1]}")
    if center:
        return round(spare_x / 2), round(spare_y / 2)
    top, left = random.randint(0, spare_y), random.randint(0, spare_x)
    return left, top


def to_array(image: Image.Image) -> Pixels:
    """The pixels of an RGB picture as uint8 [H,W,3], 0..255, in memory of their own."""
    return np.array(image.convert("RGB"), dtype=np.uint8)


def warnings_for(width: int, height: int, resolution: int) -> str | None:
    """What speaks against training on a picture of this size, in words; None where nothing does.

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
        kept = 100 * short // long  # rounded down: the promise must not be larger than what is kept
        faults.append(
            f"a square crop keeps {f'only {kept}' if kept else 'less than 1'} % of it "
            "(crop it around the subject yourself)"
        )
    return f"is {width} x {height} pixels: {' and '.join(faults)}" if faults else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Pillow's warnings (odd EXIF, sizes): what matters of them becomes an error here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _decoded(path: Path, limits: Limits, finish: Callable[[ImageFile.ImageFile], T]) -> T:
    """Open by content, check the size that the header promises, then let `finish` decode."""
    with opened(path, limits=limits) as file:
        kind = format_of(file)
        if kind is None:
            empty = os.fstat(file.fileno()).st_size == 0
            raise PictureError(path, "is empty" if empty else "holds no known picture format")
        if kind not in FORMATS:
            raise PictureError(path, f"is in {kind} format (save it as one of {FORMATS_TEXT})")
        try:
            with Image.open(file, formats=(kind,)) as image:
                _refuse_bomb(path, *image.size, limits)
                return finish(image)
        except Image.DecompressionBombError as error:
            raise PictureError(path, "has too many pixels to be opened safely") from error
        except MemoryError as error:
            raise PictureError(path, "needs more memory than there is") from error
        except _DECODER_FAULTS as error:
            raise PictureError(path, f"is damaged ({why(error)})") from error


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
    """EXIF orientation 1..8 of a loaded picture; 1 where there is none or it makes no sense."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except _DECODER_FAULTS:  # a broken EXIF block does not make the pixels worse
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


def _facts(image: ImageFile.ImageFile) -> ImageFacts:
    width, height = image.size
    drafted = image.draft("RGB", (1, 1)) is not None  # only JPEG can be decoded small
    image.load()
    if not drafted:
        width, height = image.size  # TIFF turns itself upright while loading
    if _orientation(image) >= 5:
        width, height = height, width
    return ImageFacts(width=width, height=height)


def _upright_rgb(image: ImageFile.ImageFile, limits: Limits) -> Image.Image:
    image.load()
    turn = _TURNS.get(_orientation(image))
    rgb = to_srgb(_rgb(image), image, limits=limits)
    if turn is not None:
        rgb = rgb.transpose(turn)
    rgb.info.clear()  # nobody after us shall turn it again or save its profile
    return rgb


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in {"I", "F"} or image.mode.startswith("I;16"):
        return _deep_to_rgb(image)
    if image.mode == "La":  # premultiplied alpha has one way out only
        image = image.convert("LA")
    if not image.has_transparency_data:
        return image.convert("RGB")
    upper = image.convert("RGBA")
    white = Image.new("RGBA", upper.size, "white")
    white.alpha_composite(upper)
    return white.convert("RGB")


def _deep_to_rgb(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits -> RGB; one grey level may be declared transparent (PNG tRNS)."""
    values = np.asarray(image)
    grey = _eight_bits(values)
    level = image.info.get("transparency")
    if isinstance(level, int):
        grey = np.where(values == level, np.uint8(255), grey)
    return Image.fromarray(grey).convert("RGB")


def _eight_bits(values: npt.NDArray[np.generic]) -> Pixels:
    """Scale to 0..255: 16 bits by 257, floats 0..1 by 255, others from minimum to maximum."""
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
