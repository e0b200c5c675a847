"""Makes the picture sections of the report page from thumbnails under a cap.

Thumbnails are data URIs. One picture is in memory at a time. A picture that can no longer be read
is left out.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image

from dreambooth.data import images
from dreambooth.data.picture_files import PictureError
from dreambooth.report.html import section, text
from dreambooth.report.report_data import InstancePicture, ReportData

MAX_INSTANCE_IMAGES = 40
MAX_CROPS = 4  # shown per picture; the outlines show all
MAX_CLASS_IMAGES = 24
MAX_STEP_PICTURES = 24
# Longest sides in pixels.
_FINAL, _WHOLE, _CROP, _CLASS, _STEP = 640, 480, 224, 192, 256
_LOSSLESS_SIDE = 128  # up to here a PNG is small and JPEG's blocks would show
_JPEG_QUALITY = 82

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Thumbnail:
    """A shrunk picture. uri: `data:image/...;base64,...`; width, height: in pixels."""

    uri: str
    width: int
    height: int


class Thumbnails:
    """Makes thumbnails until their URIs together would pass `max_bytes`; counts those left out."""

    def __init__(self, max_bytes: int) -> None:
        self._remaining_bytes = max_bytes
        self._kept_bytes = 0  # reserved for later sections
        self._full = False
        self.left_out = 0

    @contextmanager
    def share_of(self, sections: int) -> Iterator[None]:
        """Let the block use an equal share of the remaining bytes; later blocks may use its rest.

        sections: how many still share the bytes, this one included.
        """
        self._kept_bytes = self._remaining_bytes - self._remaining_bytes // sections
        self._full = False
        yield
        self._kept_bytes = 0

    def make(self, image: Image.Image, *, side: int) -> Thumbnail | None:
        """Return an RGB picture of at most `side` pixels, never enlarged; None above the cap."""
        if self._full:
            self.left_out += 1
            return None
        scale = min(1.0, side / max(image.size))
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        if size != image.size:
            image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
        uri = _data_uri(image)
        if len(uri) > self._remaining_bytes - self._kept_bytes:
            self.left_out += 1
            self._full = True  # all that follow are left out, so there are no gaps in the middle
            return None
        self._remaining_bytes -= len(uri)
        return Thumbnail(uri=uri, width=size[0], height=size[1])


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    if max(image.size) <= _LOSSLESS_SIDE:
        kind = "png"
        image.save(buffer, "PNG", optimize=True)
    else:
        kind = "jpeg"
        image.convert("RGB").save(buffer, "JPEG", quality=_JPEG_QUALITY, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def drawn(data: ReportData, thumbnails: Thumbnails) -> str:
    """Return the section of the final sample picture and those over the steps, "" without any."""
    final, strip = "", []
    thumbnail = None
    if data.last_sample is not None:
        thumbnail = thumbnails.make(data.last_sample, side=_FINAL)
    if thumbnail is not None:
        figure = _figure(thumbnail, f"after the last step, {data.steps}", data.sample_prompt)
        final = f'<div class="final">{figure}</div>'
    for step, path in _spread(data.step_pictures, MAX_STEP_PICTURES):
        thumbnail = _thumbnail_of(path, thumbnails, side=_STEP)
        if thumbnail is not None:
            strip.append(_figure(thumbnail, f"step {step}", f"{data.sample_prompt}, step {step}"))
    steps = f'<div class="strip">{"".join(strip)}</div>' if strip else ""
    if not final and not steps:
        return ""
    note = f"Prompt: <q>{text(data.sample_prompt)}</q>; the same seed every time."
    if len(data.step_pictures) > len(strip):
        note += f" All {len(data.step_pictures)} are in <code>samples/</code>."
    if not data.step_pictures:
        note += " Set <code>sample_steps</code> to see pictures over the steps."
    both = " both" if final and steps else ""
    return section("What it draws", f'<div class="drawn{both}">{final}{steps}</div>', note)


def instance_images(data: ReportData, thumbnails: Thumbnails) -> str:
    """Return the section of the instance images, each upright and whole beside its crops."""
    cards = []
    for picture in data.instance_pictures[:MAX_INSTANCE_IMAGES]:
        try:
            image = images.open_image(picture.path)
        except PictureError:
            continue
        card = _card(picture, image, data.resolution, thumbnails)
        if card:
            cards.append(card)
    note = (
        "The whole picture, upright, and beside it what the model sees of it: squares of "
        f"{data.resolution} x {data.resolution} pixels. Outlines show every cached crop, "
        "coloured ones those beside."
    )
    count = len(data.instance_pictures)
    if len(cards) < count:
        note += f" {count} were trained on, {_count_of(cards)} of them here."
    return section("Instance images", f'<div class="cards">{"".join(cards)}</div>', note)


def _card(
    picture: InstancePicture, image: Image.Image, resolution: int, thumbnails: Thumbnails
) -> str:
    """Return one instance image with outlines of its crops, and some crops; "" above the cap."""
    whole = thumbnails.make(image, side=_WHOLE)
    if whole is None:
        return ""
    name = picture.path.name
    resized = images.resize(image, resolution)
    crops = []
    for number, (left, top) in enumerate(picture.offsets[:MAX_CROPS]):
        box = (left, top, left + resolution, top + resolution)
        crop = thumbnails.make(resized.crop(box), side=_CROP)
        if crop is not None:
            crops.append(_image(crop, f"crop {number + 1} of {name}", kind=f"c{number}"))
    count = len(picture.offsets)
    crop_count = f"{count} crops" if count > 1 else "1 crop"
    if count > len(crops):
        crop_count += f", {_count_of(crops)} of them here"
    return (
        f'<figure class="card"><div class="pair"><div class="whole">{_image(whole, name)}'
        f"{_outlines(picture, image.size, resolution)}</div>"
        f'<div class="crops n{len(crops)}">{"".join(crops)}</div></div><figcaption>{text(name)} '
        f"<span>{image.width} x {image.height}, {crop_count}</span></figcaption></figure>"
    )


def _outlines(picture: InstancePicture, size: tuple[int, int], resolution: int) -> str:
    """Return the squares of all crops as an overlay for the whole picture of `size`."""
    if max(size) > images.MAX_SHAPE_RATIO * min(size) or max(picture.size) == resolution:
        return ""  # only a part of it was resized, or the crop is the whole picture
    rectangles = []
    for number, (left, top) in reversed(list(enumerate(picture.offsets))):  # coloured ones on top
        kind = f' class="here c{number}"' if number < MAX_CROPS else ""
        rectangles.append(
            f'<rect{kind} x="{left}" y="{top}" width="{resolution}" height="{resolution}"/>'
        )
    width, height = picture.size
    return (
        f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" aria-hidden="true">'
        f"{''.join(rectangles)}</svg>"
    )


def class_images(data: ReportData, thumbnails: Thumbnails) -> str:
    """Return the section with a sample of the class images, "" for a run without them."""
    if not data.class_images:
        return ""
    pictures = []
    for path in _spread(data.class_images, MAX_CLASS_IMAGES):
        thumbnail = _thumbnail_of(path, thumbnails, side=_CLASS)
        if thumbnail is not None:
            pictures.append(_image(thumbnail, path.name))
    count = len(data.class_images)
    note = f"Prompt: <q>{text(data.class_prompt or '')}</q>; {count} in all"
    note += f", {_count_of(pictures)} of them here." if len(pictures) < count else "."
    return section("Class images", f'<div class="grid">{"".join(pictures)}</div>', note)


def _count_of(shown: Sequence[str]) -> str:
    return str(len(shown) or "none")


def _figure(thumbnail: Thumbnail, caption: str, alt: str) -> str:
    return f"<figure>{_image(thumbnail, alt)}<figcaption>{text(caption)}</figcaption></figure>"


def _image(thumbnail: Thumbnail, alt: str, *, kind: str = "") -> str:
    small = "small" if max(thumbnail.width, thumbnail.height) <= _LOSSLESS_SIDE else ""
    return (
        f'<img class="{small} {kind}" src="{thumbnail.uri}" width="{thumbnail.width}" '
        f'height="{thumbnail.height}" alt="{text(alt)}">'
    )


def _thumbnail_of(path: Path, thumbnails: Thumbnails, *, side: int) -> Thumbnail | None:
    """Return a file's thumbnail; None above the cap or where it can no longer be read."""
    try:
        return thumbnails.make(images.open_image(path), side=side)
    except PictureError:
        return None


def _spread(items: Sequence[T], most: int) -> list[T]:
    """Return at most `most` items at even distances, including the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[number * (len(items) - 1) // (most - 1)] for number in range(most)]
