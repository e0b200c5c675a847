"""Embedded colour profiles (ICC.1): colours of Display P3, Adobe RGB, print, ... -> those of sRGB.

Models are trained on sRGB. Profiles come from strangers: one that is broken, too large, or made for
another kind of picture is ignored. Legend: H W pixels, uint8 0..255.
"""

from __future__ import annotations

import io
from itertools import product

from PIL import Image, ImageChops, ImageCms

from dreambooth.limits import LIMITS, Limits

SAME_WITHIN = 2
"""Levels of 255 by which a profile that is sRGB by another name may move a colour."""

_COLOUR_MODES = frozenset({"RGB", "RGBA", "RGBa", "RGBX", "P", "PA"})
_GREY_MODES = frozenset({"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N"})
_PROBED = bytes(value for colour in product(range(0, 256, 51), repeat=3) for value in colour)

# What Pillow raises for profiles that Little CMS does not take.
_FAULTS = (ImageCms.PyCMSError, OSError, ValueError, TypeError)


def to_srgb(rgb: Image.Image, stored: Image.Image, *, limits: Limits = LIMITS) -> Image.Image:
    """`rgb` [H,W,3] with the colours that the profile of the `stored` picture means.

    stored: the decoded picture that `rgb` was made of, in the mode of its file. Without a profile,
    with one that is sRGB or cannot be used, `rgb` comes back bit for bit; else it may be reused.
    """
    data = stored.info.get("icc_profile")
    if not isinstance(data, bytes) or not 0 < len(data) <= limits.max_colour_profile_bytes:
        return rgb
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        source = _as_described(rgb, stored, str(profile.profile.xcolor_space).strip())
        if source is None:
            return rgb
        transform = ImageCms.buildTransform(
            profile,
            ImageCms.createProfile("sRGB"),
            source.mode,
            "RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,  # white stays white
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,  # and black does not turn grey
        )
        if source is not rgb:
            return ImageCms.applyTransform(source, transform) or rgb
        if not _is_srgb(transform):
            ImageCms.applyTransform(rgb, transform, inPlace=True)  # another copy may not fit
        return rgb
    except _FAULTS:
        return rgb


def _as_described(rgb: Image.Image, stored: Image.Image, space: str) -> Image.Image | None:
    """The picture in the mode that a profile of this colour space speaks of; None: not its kind."""
    if space == "RGB" and stored.mode in _COLOUR_MODES:
        return rgb
    if space == "GRAY" and stored.mode in _GREY_MODES:
        return rgb.getchannel(0)  # all three are the same, and lie on white by now
    if space == "CMYK" and stored.mode == "CMYK":
        return stored
    return None


def _is_srgb(transform: ImageCms.ImageCmsTransform) -> bool:
    """Whether colours stay where they are: names lie, and the same profile has many of them."""
    probe = Image.frombytes("RGB", (len(_PROBED) // 3, 1), _PROBED)
    moved = ImageCms.applyTransform(probe, transform)
    if moved is None:  # only where it is asked to work in place
        return False
    return max(ImageChops.difference(probe, moved).tobytes()) <= SAME_WITHIN
