"""Find and read the masks that say where in a picture the subject is.

A mask is `NAME.mask.png` beside the picture `NAME.jpg`, white where the subject is, or the
transparency of the picture itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dreambooth.data import images
from dreambooth.data.picture_files import printable
from dreambooth.errors import DatasetError
from dreambooth.limits import LIMITS, Limits

SUFFIX = ".mask.png"
_LEAST = 0.5 / 255  # below it nothing of a picture would be learned


def beside(paths: Sequence[Path]) -> dict[Path, Path]:
    """Return the mask of each picture that has one beside it, by the picture's path."""
    pictures = {path.stem: path for path in paths if not path.name.lower().endswith(SUFFIX)}
    found = {}
    for path in paths:
        if path.name.lower().endswith(SUFFIX):
            picture = pictures.get(path.name[: -len(SUFFIX)])
            if picture is not None:
                found[picture] = path
    return found


def check_size(named: str, size: tuple[int, int], of_picture: tuple[int, int]) -> None:
    """Raise DatasetError unless a mask is of its picture's (width, height)."""
    if size != of_picture:
        raise DatasetError(
            f"{named} is {size[0]} x {size[1]} pixels and its picture {of_picture[0]} x "
            f"{of_picture[1]}: make them equal."
        )


def read(
    picture: Path,
    mask: Path | None,
    *,
    size: tuple[int, int],
    sha256: bytes | None = None,
    limits: Limits = LIMITS,
) -> Image.Image | None:
    """Return the mask of a picture, mode L; None for a picture without one.

    mask: the file beside it. size: (width, height) of the upright picture. sha256: that of the mask
    when it was checked. Raises DatasetError for
    a mask of another size, and for one that is black everywhere.
    """
    if mask is None:
        found = images.open_transparency(picture, limits=limits)
        if found is None:
            return None
        named = f"The transparency of {printable(picture.name)}"
    else:
        found = images.open_image(mask, sha256=sha256, limits=limits).convert("L")
        named = f"The mask {printable(mask.name)}"
    check_size(named, found.size, size)
    if np.asarray(found).mean() / 255 < _LEAST:
        raise DatasetError(
            f"{named} hides all of the picture: make it white where the subject is, or remove it."
        )
    return found
