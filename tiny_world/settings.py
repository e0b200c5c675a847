"""Paint the settings of the drawn world.

Each painter fills a 256x256 canvas, with random detail, before the figure is drawn.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from PIL import Image, ImageDraw

from tiny_world.brush import CANVAS, Rgb


def _between(low: Rgb, high: Rgb, share: float) -> Rgb:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(low, high, strict=True))
    return red, green, blue


def _gradient(pen: ImageDraw.ImageDraw, top: int, bottom: int, first: Rgb, last: Rgb) -> None:
    for y in range(top, bottom):
        pen.line((0, y, CANVAS, y), fill=_between(first, last, (y - top) / max(1, bottom - top)))


def _beach(pen: ImageDraw.ImageDraw, rng: random.Random) -> None:
    horizon = rng.randint(84, 104)
    shore = horizon + rng.randint(42, 58)
    _gradient(pen, 0, horizon, (122, 196, 246), (178, 224, 250))
    _gradient(pen, horizon, shore, (26, 104, 186), (58, 150, 210))
    _gradient(pen, shore, CANVAS, (246, 220, 160), (232, 198, 134))
    x, y = rng.randint(20, 236), rng.randint(18, 46)
    pen.ellipse((x - 18, y - 18, x + 18, y + 18), fill=(255, 232, 96))
    for _ in range(3):
        x, y = rng.randint(0, 230), rng.randint(horizon + 8, shore - 8)
        pen.line((x, y, x + 24, y), fill=(214, 236, 248), width=4)


def _grass(pen: ImageDraw.ImageDraw, rng: random.Random) -> None:
    horizon = rng.randint(118, 142)
    _gradient(pen, 0, horizon, (150, 208, 246), (222, 242, 250))
    _gradient(pen, horizon, CANVAS, (92, 182, 66), (52, 140, 44))
    x = rng.choice((rng.randint(8, 60), rng.randint(196, 248)))
    pen.rectangle((x - 8, horizon - 50, x + 8, horizon + 8), fill=(110, 74, 44))
    pen.ellipse((x - 38, horizon - 112, x + 38, horizon - 36), fill=(38, 122, 46))
    for _ in range(7):
        x, y = rng.randint(4, 252), rng.randint(horizon + 14, 250)
        color = rng.choice(((250, 220, 60), (250, 250, 250), (236, 80, 110)))
        pen.ellipse((x - 5, y - 5, x + 5, y + 5), fill=color)


def _snow(pen: ImageDraw.ImageDraw, rng: random.Random) -> None:
    horizon = rng.randint(128, 150)
    _gradient(pen, 0, horizon, (132, 146, 172), (190, 200, 216))
    _gradient(pen, horizon, CANVAS, (250, 252, 255), (220, 230, 244))
    for x in (rng.randint(4, 70), rng.randint(186, 252)):
        height = rng.randint(70, 100)
        for level in range(3):
            top = horizon + 10 - height + level * height // 4
            half = 16 + level * 7
            pen.polygon(
                ((x, top), (x - half, top + height // 2), (x + half, top + height // 2)),
                (28, 92, 74),
            )
    for _ in range(24):
        x, y = rng.randint(0, 255), rng.randint(0, horizon)
        pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=(255, 255, 255))


def _room(pen: ImageDraw.ImageDraw, rng: random.Random) -> None:
    floor = rng.randint(150, 170)
    wall = rng.choice(((238, 226, 186), (206, 222, 200), (240, 200, 192), (216, 210, 232)))
    wood = rng.choice(((150, 92, 52), (170, 112, 66)))
    pen.rectangle((0, 0, CANVAS, floor), fill=wall)
    pen.rectangle((0, floor, CANVAS, CANVAS), fill=wood)
    for y in range(floor + 20, CANVAS, 24):
        pen.line((0, y, CANVAS, y), fill=(126, 76, 42), width=3)
    pen.rectangle((0, floor - 8, CANVAS, floor), fill=(250, 248, 242))
    x, y = rng.choice((rng.randint(8, 40), rng.randint(172, 196))), rng.randint(12, 34)
    pen.rectangle((x - 5, y - 5, x + 59, y + 69), fill=(252, 252, 252))
    for dx, dy in ((0, 0), (30, 0), (0, 34), (30, 34)):
        pen.rectangle((x + dx, y + dy, x + dx + 24, y + dy + 30), fill=(136, 206, 240))


def _street(pen: ImageDraw.ImageDraw, rng: random.Random) -> None:
    curb = rng.randint(140, 156)
    wall = rng.choice(((164, 84, 72), (128, 112, 104), (150, 104, 84)))
    pen.rectangle((0, 0, CANVAS, curb), fill=wall)
    shift = rng.randint(0, 30)
    for row in range(2):
        for column in range(-1, 5):
            x, y = column * 62 + shift, 14 + row * 62
            lit = rng.random() < 0.3
            pen.rectangle((x, y, x + 32, y + 40), fill=(252, 222, 120) if lit else (64, 76, 108))
    pen.rectangle((0, curb, CANVAS, curb + 10), fill=(188, 188, 190))
    pen.rectangle((0, curb + 10, CANVAS, CANVAS), fill=(78, 80, 86))
    for x in range(-20 + shift, CANVAS, 90):
        pen.rectangle((x, 242, x + 44, 250), fill=(236, 236, 236))


def _studio(pen: ImageDraw.ImageDraw, rng: random.Random) -> None:
    tints = ((96, 92, 196), (66, 160, 172), (188, 92, 164), (176, 170, 78), (92, 120, 170))
    tint = rng.choice(tints)
    light = _between(tint, (255, 255, 255), 0.25)
    dark = _between(tint, (0, 0, 0), 0.18)
    _gradient(pen, 0, CANVAS, light, dark)


SETTINGS: dict[str, Callable[[ImageDraw.ImageDraw, random.Random], None]] = {
    "beach": _beach,
    "grass": _grass,
    "snow": _snow,
    "room": _room,
    "street": _street,
    "studio": _studio,
}
"""The painter of each setting, in the order of the judge's labels."""


def paint_setting(name: str, rng: random.Random) -> Image.Image:
    """Return a new 256x256 RGB canvas of the named setting."""
    image = Image.new("RGB", (CANVAS, CANVAS))
    SETTINGS[name](ImageDraw.Draw(image), rng)
    return image
