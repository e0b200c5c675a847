"""Chooses the pictures of the report page and makes their thumbnails under a cap.

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
from dreambooth.report.report_data import InstancePicture, MeterPicture, ReportData, in_words

MAX_INSTANCE_IMAGES = 40
MAX_CROPS = 4  # shown per picture; the outlines show all
MAX_CLASS_IMAGES = 24
MAX_STEP_PICTURES = 24
MAX_METER_STEPS = 12
# Longest sides in pixels.
_FINAL, _WHOLE, _CROP, _CLASS, _STEP = 640, 480, 224, 192, 256
_LOSSLESS_SIDE = 128  # up to here a PNG is small and JPEG's blocks would show
_JPEG_QUALITY = 82

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Thumbnail:
    """A shrunk picture. uri: `data:image/...;base64,...`; width, height: in pixels; alt: a name."""

    uri: str
    width: int
    height: int
    alt: str

    @property
    def lossless(self) -> bool:
        """Return whether it is so small that it is a PNG and is shown with sharp pixels."""
        return max(self.width, self.height) <= _LOSSLESS_SIDE


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceCard:
    """An instance image of `width` x `height` pixels, whole and upright, and some of its crops.

    outlined: the outlines of its crops can be drawn over the whole picture.
    """

    picture: InstancePicture
    width: int
    height: int
    whole: Thumbnail
    crops: Sequence[Thumbnail]
    outlined: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class MeterRow:
    """The meter's pictures of one step, each with its prompt, and their scores in words."""

    step: int
    pictures: Sequence[tuple[str, Thumbnail]]
    scores: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownPictures:
    """The pictures of each section. steps: (step, picture). left_out: how many the cap left out."""

    final: Thumbnail | None
    steps: Sequence[tuple[int, Thumbnail]]
    meter: Sequence[MeterRow]
    instance_images: Sequence[InstanceCard]
    class_images: Sequence[Thumbnail]
    left_out: int


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

    def make(self, image: Image.Image, *, side: int, alt: str) -> Thumbnail | None:
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
        return Thumbnail(uri=uri, width=size[0], height=size[1], alt=alt)


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    if max(image.size) <= _LOSSLESS_SIDE:
        kind = "png"
        image.save(buffer, "PNG", optimize=True)
    else:
        kind = "jpeg"
        image.convert("RGB").save(buffer, "JPEG", quality=_JPEG_QUALITY, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def choose(data: ReportData, *, max_bytes: int) -> ShownPictures:
    """Return the pictures of the page, whose URIs take at most `max_bytes` together."""
    thumbnails = Thumbnails(max_bytes)
    final = None
    # The smallest sections come first: what they leave of their share goes to the larger ones.
    with thumbnails.share_of(3 + bool(data.meter_pictures)):
        class_images = [
            thumbnail
            for path in _spread(data.class_images, MAX_CLASS_IMAGES)
            if (thumbnail := _thumbnail_of(path, thumbnails, side=_CLASS, alt=path.name))
        ]
    with thumbnails.share_of(3):
        meter = _meter_rows(data, thumbnails)
    with thumbnails.share_of(2):
        if data.last_sample is not None:
            final = thumbnails.make(data.last_sample, side=_FINAL, alt=data.sample_prompt)
        steps = []
        for step, path in _spread(data.step_pictures, MAX_STEP_PICTURES):
            alt = f"{data.sample_prompt}, step {step}"
            if thumbnail := _thumbnail_of(path, thumbnails, side=_STEP, alt=alt):
                steps.append((step, thumbnail))
    with thumbnails.share_of(1):
        instance_images = [
            card
            for picture in data.instance_pictures[:MAX_INSTANCE_IMAGES]
            if (card := _card(picture, data.resolution, thumbnails))
        ]
    return ShownPictures(
        final=final,
        steps=steps,
        meter=meter,
        instance_images=instance_images,
        class_images=class_images,
        left_out=thumbnails.left_out,
    )


def _meter_rows(data: ReportData, thumbnails: Thumbnails) -> list[MeterRow]:
    """Return a row for each step that is shown, the chosen one in any case."""
    by_step: dict[int, list[MeterPicture]] = {}
    for one in data.meter_pictures:
        by_step.setdefault(one.step, []).append(one)
    shown = {*_spread(list(by_step), MAX_METER_STEPS), data.kept_step}
    rows = []
    for step in sorted(by_step.keys() & shown):
        found = []
        for one in by_step[step]:
            prompt = data.meter_prompts.get(one.name, one.name)
            alt = f"{prompt}, meter, step {step}"
            if thumbnail := _thumbnail_of(one.path, thumbnails, side=_STEP, alt=alt):
                found.append((prompt, thumbnail))
        if found:
            scores = in_words(data.meter_scores.get(step, {}))
            rows.append(MeterRow(step=step, pictures=found, scores=scores))
    return rows


def _card(picture: InstancePicture, resolution: int, thumbnails: Thumbnails) -> InstanceCard | None:
    """Return an instance image with some crops; None above the cap or where it cannot be read."""
    try:
        image = images.open_image(picture.path)
    except PictureError:
        return None
    name = picture.path.name
    whole = thumbnails.make(image, side=_WHOLE, alt=name)
    if whole is None:
        return None
    resized = images.resize(image, resolution)
    crops = []
    for number, (left, top) in enumerate(picture.offsets[:MAX_CROPS], start=1):
        crop = resized.crop((left, top, left + resolution, top + resolution))
        if thumbnail := thumbnails.make(crop, side=_CROP, alt=f"crop {number} of {name}"):
            crops.append(thumbnail)
    # Without outlines: only a part of the picture was resized, or the crop is the whole picture.
    narrow = max(image.size) > images.MAX_SHAPE_RATIO * min(image.size)
    return InstanceCard(
        picture=picture,
        width=image.width,
        height=image.height,
        whole=whole,
        crops=crops,
        outlined=not narrow and max(picture.size) != resolution,
    )


def _thumbnail_of(path: Path, thumbnails: Thumbnails, *, side: int, alt: str) -> Thumbnail | None:
    """Return a file's thumbnail; None above the cap or where it can no longer be read."""
    try:
        return thumbnails.make(images.open_image(path), side=side, alt=alt)
    except PictureError:
        return None


def _spread(items: Sequence[T], most: int) -> list[T]:
    """Return at most `most` items at even distances, including the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[number * (len(items) - 1) // (most - 1)] for number in range(most)]
