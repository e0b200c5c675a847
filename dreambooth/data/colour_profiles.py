"""Convert pictures with embedded ICC.1 profiles (Display P3, Adobe RGB, print, ...) to sRGB.

Models are trained on sRGB. Profiles are untrusted: one that is broken, too large, or made for
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

# What Pillow raises for profiles that Little CMS does not accept.
_FAULTS = (ImageCms.PyCMSError, OSError, ValueError, TypeError)


def to_srgb(rgb: Image.Image, stored: Image.Image, *, limits: Limits = LIMITS) -> Image.Image:
    """Return `rgb` [H,W,3] with its colours converted to sRGB by the profile in `stored`.

    stored: the decoded picture that `rgb` was made from, in the mode of its file. Without a
    profile, or with one that is sRGB or unusable, `rgb` is returned unchanged; otherwise it may be
    converted in place.
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
            ImageCms.applyTransform(rgb, transform, inPlace=True)  # a copy may not fit into memory
        return rgb
    except _FAULTS:
        return rgb


def _as_described(rgb: Image.Image, stored: Image.Image, space: str) -> Image.Image | None:
    """Return the picture in the mode that a profile of this colour space expects, or None."""
    if space == "RGB" and stored.mode in _COLOUR_MODES:
        return rgb
    if space == "GRAY" and stored.mode in _GREY_MODES:
        return rgb.getchannel(0)  # all three are equal, with transparency on white
    if space == "CMYK" and stored.mode == "CMYK":
        return stored
    return None


def _is_srgb(transform: ImageCms.ImageCmsTransform) -> bool:
    """Return whether colours stay the same; names prove nothing, as sRGB profiles have many."""
    probe = Image.frombytes("RGB", (len(_PROBED) // 3, 1), _PROBED)
    moved = ImageCms.applyTransform(probe, transform)
    if moved is None:  # only when working in place
        return False
    return max(ImageChops.difference(probe, moved).tobytes()) <= SAME_WITHIN
