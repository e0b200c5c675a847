"""Draw figures from parts on a 256x256 canvas, which is box-reduced to 64x64 later.

A figure is made of parts (ellipses, polygons, thick lines) in its own coordinates: the origin lies
on the ground under it, one unit is one pixel of the canvas at scale 1, and y grows downwards, so
everything above the ground has a negative y.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageChops, ImageDraw, ImageFilter

CANVAS = 256
SIZE = 64

Rgb = tuple[int, int, int]
Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Ellipse:
    """An upright ellipse, given by its centre and half axes."""

    x: float
    y: float
    rx: float
    ry: float


@dataclass(frozen=True, slots=True)
class Polygon:
    """A filled polygon."""

    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class Stroke:
    """A thick line with round ends."""

    points: tuple[Point, ...]
    width: float


Part = Ellipse | Polygon | Stroke


@dataclass(frozen=True, slots=True, kw_only=True)
class Pose:
    """The position of a figure on the canvas.

    x, y: its ground point. flip: whether it is mirrored. head_x, head_y: how far its head is moved,
    in figure units.
    """

    x: float
    y: float
    scale: float
    flip: bool
    head_x: float = 0.0
    head_y: float = 0.0

    def place(self, x: float, y: float) -> Point:
        """Turn figure coordinates into canvas coordinates."""
        return self.x + (-x if self.flip else x) * self.scale, self.y + y * self.scale

    def head(self) -> Pose:
        """Return the pose of the head: this pose, moved by head_x and head_y."""
        x, y = self.place(self.head_x, self.head_y)
        return Pose(x=x, y=y, scale=self.scale, flip=self.flip)


@dataclass(frozen=True, slots=True, kw_only=True)
class Paint:
    """The colours of a figure and its marking, a name of `world.MARKINGS`.

    bandana: None for a figure without one.
    """

    coat: Rgb
    mark: Rgb
    bandana: Rgb | None
    marking: str
    marks_seed: int


def shade(color: Rgb, factor: float) -> Rgb:
    """Return a darker (factor below 1) or lighter colour, kept within 0..255."""
    red, green, blue = (max(0, min(255, round(channel * factor))) for channel in color)
    return red, green, blue


def draw_part(
    pen: ImageDraw.ImageDraw, part: Part, pose: Pose, fill: Rgb | int, grow: float = 0.0
) -> None:
    """Draw one part, grown by `grow` canvas pixels on every side (for the outline)."""
    if isinstance(part, Ellipse):
        x, y = pose.place(part.x, part.y)
        rx, ry = part.rx * pose.scale + grow, part.ry * pose.scale + grow
        pen.ellipse((x - rx, y - ry, x + rx, y + ry), fill=fill)
        return
    points = [pose.place(*point) for point in part.points]
    width = grow * 2
    if isinstance(part, Polygon):
        pen.polygon(points, fill=fill)
        points = [*points, points[0]]
    else:
        width += part.width * pose.scale
    if width < 1:
        return
    pen.line(points, fill=fill, width=max(1, round(width)), joint="curve")
    radius = width / 2
    for x, y in points:
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)


def draw_group(
    image: Image.Image,
    parts: Sequence[Part],
    marks: Sequence[Part],
    pose: Pose,
    paint: Paint,
) -> None:
    """Draw parts that make one shape.

    A dark outline surrounds all of them, and the marks stay inside.
    """
    pen = ImageDraw.Draw(image)
    outline = shade(paint.coat, 0.42)
    mask = Image.new("L", image.size, 0)
    mask_pen = ImageDraw.Draw(mask)
    for part in parts:
        draw_part(pen, part, pose, outline, grow=3.0)
    for part in parts:
        draw_part(pen, part, pose, paint.coat)
        draw_part(mask_pen, part, pose, 255)
    if marks:
        inside = Image.new("L", image.size, 0)
        marks_pen = ImageDraw.Draw(inside)
        for part in marks:
            draw_part(marks_pen, part, pose, 255)
        image.paste(paint.mark, mask=ImageChops.multiply(mask, inside))


def pencil(image: Image.Image) -> Image.Image:
    """Turn a picture into a pencil sketch at half its size.

    A difference of Gaussians gives dark lines on light paper.
    """
    gray = image.convert("L").reduce(2)
    fine = gray.filter(ImageFilter.GaussianBlur(0.8))
    coarse = gray.filter(ImageFilter.GaussianBlur(3.0))
    lines = ImageChops.subtract(coarse, fine, scale=0.22)
    paper = ImageChops.invert(lines)
    toned = ImageChops.multiply(
        paper, gray.point([round(205 + value * 0.16) for value in range(256)])
    )
    return Image.merge("RGB", [toned] * 3)


def draw_shadow(image: Image.Image, pose: Pose, width: float) -> None:
    """Draw a translucent dark ellipse on the ground."""
    x, y = pose.place(0, 2)
    rx, ry = width * pose.scale, 9 * pose.scale
    box = (round(x - rx), round(y - ry), round(x + rx), round(y + ry))
    mask = Image.new("L", image.size, 0)
    ImageDraw.Draw(mask).ellipse(box, fill=70)
    image.paste((0, 0, 0), mask=mask)
