"""Draw the figures of the drawn world: their parts, their marks and their poses.

Captions and names are no concern of this module; `world` decides what is drawn.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from PIL import Image, ImageDraw

from tiny_world.brush import (
    CANVAS,
    Ellipse,
    Paint,
    Part,
    Point,
    Polygon,
    Pose,
    Rgb,
    Stroke,
    draw_group,
    draw_part,
    shade,
)


def _mirror(points: Sequence[Point]) -> tuple[Point, ...]:
    return tuple((-x, y) for x, y in points)


def _draw_bandana(image: Image.Image, parts: Sequence[Part], pose: Pose, color: Rgb) -> None:
    pen = ImageDraw.Draw(image)
    for part in parts:
        draw_part(pen, part, pose, shade(color, 0.5), grow=2.0)
    for part in parts:
        draw_part(pen, part, pose, color)


# The cat sits and faces the viewer; its tail curls up beside it.

_CAT_EAR: tuple[Point, ...] = ((-45, -138), (-42, -200), (-6, -162))
_CAT_EAR_INSIDE: tuple[Point, ...] = ((-37, -152), (-36, -184), (-17, -163))
_CAT_BODY: tuple[Part, ...] = (
    Stroke(((28, -16), (62, -16), (80, -46), (76, -84), (84, -104)), 19),
    Ellipse(0, -46, 46, 49),
    Ellipse(0, -82, 34, 36),
    Ellipse(-20, -9, 18, 11),
    Ellipse(20, -9, 18, 11),
)
_CAT_HEAD: tuple[Part, ...] = (
    Polygon(_CAT_EAR),
    Polygon(_mirror(_CAT_EAR)),
    Ellipse(0, -130, 50, 38),
)
_CAT_BANDANA: tuple[Part, ...] = (
    Polygon(((-38, -104), (38, -104), (30, -88), (0, -52), (-30, -88))),
)


def _cat_marks(marking: str, rng: random.Random) -> tuple[list[Part], list[Part]]:
    side = rng.choice((-1, 1))
    if marking == "patched":
        body = Ellipse(
            side * 26, -38 + rng.uniform(-6, 6), rng.uniform(25, 31), rng.uniform(34, 42)
        )
        head_side = rng.choice((-1, 1))
        head = Ellipse(head_side * 26, -142 + rng.uniform(-4, 4), 25, rng.uniform(27, 34))
        return [body, Stroke(((80, -90), (86, -108)), 26)], [head]
    if marking == "spotted":
        places = ((-32, -56), (30, -60), (-24, -24), (10, -36), (36, -28), (-4, -66))
        spots: list[Part] = [_spot(x, y, rng, 10.5) for x, y in places]
        heads = ((-26, -150), (8, -158), (32, -142), (-36, -124))
        return [*spots, Ellipse(79, -62, 11, 10), Ellipse(82, -98, 11, 9)], [
            _spot(x, y, rng, 9.0) for x, y in heads
        ]
    if marking == "striped":
        shift = rng.uniform(-3, 3)
        body_stripes: list[Part] = [
            Stroke(((s * 54, y + shift), (s * 18, y + 7 + shift)), 12)
            for y in (-76, -50, -24)
            for s in (-1, 1)
        ]
        tail: list[Part] = [Stroke(((60, y), (98, y)), 11) for y in (-96, -70, -44)]
        head_stripes: list[Part] = [Stroke(((x, -172), (x * 0.8, -149)), 10) for x in (-22, 0, 22)]
        cheeks: list[Part] = [Stroke(((s * 54, -128), (s * 36, -122)), 10) for s in (-1, 1)]
        return body_stripes + tail, head_stripes + cheeks
    return [], []


def _spot(x: float, y: float, rng: random.Random, radius: float) -> Ellipse:
    size = radius * rng.uniform(0.92, 1.18)
    return Ellipse(x + rng.uniform(-3, 3), y + rng.uniform(-3, 3), size, size)


def draw_cat(image: Image.Image, pose: Pose, paint: Paint) -> None:
    """Draw a sitting cat, about 200 units tall and 130 wide."""
    rng = random.Random(f"marks/{paint.marks_seed}")
    body_marks, head_marks = _cat_marks(paint.marking, rng)
    draw_group(image, _CAT_BODY, body_marks, pose, paint)
    pen = ImageDraw.Draw(image)
    for x in (-7, 7):
        draw_part(pen, Stroke(((x, -34), (x, -8)), 2.5), pose, shade(paint.coat, 0.5))
    if paint.bandana is not None:
        _draw_bandana(image, _CAT_BANDANA, pose, paint.bandana)
    head = pose.head()
    draw_group(image, _CAT_HEAD, head_marks, head, paint)
    for points in (_CAT_EAR_INSIDE, _mirror(_CAT_EAR_INSIDE)):
        draw_part(pen, Polygon(points), head, (240, 160, 165))
    for side in (-1, 1):
        draw_part(pen, Ellipse(side * 20, -134, 13, 13), head, (30, 30, 30))
        draw_part(pen, Ellipse(side * 20, -134, 11, 11), head, (190, 220, 60))
        draw_part(pen, Ellipse(side * 20, -134, 4, 10), head, (15, 15, 15))
        for dy in (-4, 5):
            whisker = Stroke(((side * 26, -110 + dy / 2), (side * 58, -111 + dy)), 1.8)
            draw_part(pen, whisker, head, (235, 235, 235))
    draw_part(pen, Ellipse(0, -108, 17, 11), head, (250, 246, 240))
    draw_part(pen, Polygon(((-8, -119), (8, -119), (0, -109))), head, (225, 110, 120))
    draw_part(pen, Stroke(((0, -109), (0, -102)), 2.5), head, (70, 40, 40))


# The dog is seen from the side.

_DOG_FAR_LEGS: tuple[Part, ...] = (
    Stroke(((-40, -58), (-38, -10)), 18),
    Stroke(((26, -58), (24, -10)), 18),
)
_DOG_BODY: tuple[Part, ...] = (
    Stroke(((-66, -88), (-86, -108), (-90, -140)), 14),
    Ellipse(-10, -76, 66, 32),
    Ellipse(32, -82, 32, 37),
    Stroke(((-60, -64), (-62, -10)), 22),
    Stroke(((46, -64), (46, -10)), 21),
    Ellipse(-56, -8, 18, 9),
    Ellipse(52, -8, 18, 9),
    Polygon(((8, -98), (60, -72), (76, -126), (34, -146))),
)
_DOG_HEAD: tuple[Part, ...] = (
    Ellipse(60, -142, 34, 30),
    Ellipse(94, -130, 30, 17),
)
_DOG_EAR = Ellipse(40, -130, 15, 34)
_DOG_BANDANA: tuple[Part, ...] = (
    Stroke(((18, -106), (70, -96)), 16),
    Polygon(((24, -104), (74, -94), (46, -48))),
)


def _dog_marks(marking: str, rng: random.Random) -> tuple[list[Part], list[Part]]:
    if marking == "patched":
        x = rng.choice((-44, -12))
        body = Ellipse(x, -84 + rng.uniform(-5, 5), rng.uniform(26, 33), rng.uniform(26, 32))
        return [body, Stroke(((-92, -148), (-88, -124)), 24)], [
            Ellipse(70 + rng.uniform(-4, 4), -150, 22, rng.uniform(19, 25))
        ]
    if marking == "spotted":
        places = ((-58, -84), (-34, -66), (-28, -96), (-6, -78), (14, -94), (-60, -44), (46, -40))
        spots: list[Part] = [_spot(x, y, rng, 10.0) for x, y in places]
        heads: list[Part] = [_spot(x, y, rng, 8.0) for x, y in ((62, -164), (84, -150))]
        return [*spots, Ellipse(-89, -134, 10, 9)], heads
    if marking == "striped":
        shift = rng.uniform(-4, 4)
        stripes: list[Part] = [
            Stroke(((x + shift, -116), (x - 4 + shift, -58)), 12) for x in (-60, -34, -8)
        ]
        legs: list[Part] = [Stroke(((x - 14, -34), (x + 14, -34)), 11) for x in (-61, 46)]
        tail: list[Part] = [Stroke(((-100, y), (-76, y)), 10) for y in (-136, -112)]
        return stripes + legs + tail, [Stroke(((x, -178), (x - 1, -156)), 10) for x in (54, 76)]
    return [], []


def draw_dog(image: Image.Image, pose: Pose, paint: Paint) -> None:
    """Draw a standing dog seen from the side, about 175 units tall and 220 wide."""
    rng = random.Random(f"marks/{paint.marks_seed}")
    body_marks, head_marks = _dog_marks(paint.marking, rng)
    pen = ImageDraw.Draw(image)
    for leg in _DOG_FAR_LEGS:
        draw_part(pen, leg, pose, shade(paint.coat, 0.42), grow=3.0)
        draw_part(pen, leg, pose, shade(paint.coat, 0.72))
    draw_group(image, _DOG_BODY, body_marks, pose, paint)
    if paint.bandana is not None:
        _draw_bandana(image, _DOG_BANDANA, pose, paint.bandana)
    head = pose.head()
    draw_group(image, _DOG_HEAD, head_marks, head, paint)
    draw_part(pen, _DOG_EAR, head, shade(paint.coat, 0.35), grow=3.0)
    draw_part(pen, _DOG_EAR, head, shade(paint.coat, 0.75))
    draw_part(pen, Ellipse(74, -148, 9, 9), head, (250, 250, 250))
    draw_part(pen, Ellipse(76, -147, 6, 7), head, (20, 20, 20))
    draw_part(pen, Ellipse(119, -137, 11, 9), head, (20, 20, 24))
    draw_part(pen, Stroke(((86, -118), (112, -121)), 3), head, (40, 25, 25))
    draw_part(pen, Ellipse(100, -111, 7, 10), head, (232, 96, 112))


# The chair is seen from the front, a little from above; its back and its seat are upholstered.

_WOOD: Rgb = (134, 84, 44)
_CHAIR_LEGS: tuple[Part, ...] = (
    Stroke(((-38, -70), (-36, -26)), 10),
    Stroke(((38, -70), (36, -26)), 10),
    Stroke(((-60, -68), (-64, -4)), 13),
    Stroke(((60, -68), (64, -4)), 13),
)
_CHAIR_BACK: tuple[Part, ...] = (
    Polygon(((-50, -186), (50, -186), (56, -90), (-56, -90))),
    Stroke(((-46, -188), (46, -188)), 22),
)
_CHAIR_SEAT: tuple[Part, ...] = (Polygon(((-58, -98), (58, -98), (74, -64), (-74, -64))),)

# The ottoman is a low cushioned box on four feet.

_OTTOMAN_FEET: tuple[Part, ...] = (
    Stroke(((-66, -18), (-66, -4)), 14),
    Stroke(((66, -18), (66, -4)), 14),
)
_OTTOMAN_BOX: tuple[Part, ...] = (Polygon(((-82, -60), (82, -60), (76, -14), (-76, -14))),)
_OTTOMAN_TOP: tuple[Part, ...] = (Ellipse(0, -62, 88, 24),)


def _upholstery(
    marking: str,
    rng: random.Random,
    stripes: Sequence[tuple[Point, Point]],
    spots: Sequence[Point],
) -> list[Part]:
    if marking == "striped":
        return [Stroke(stripe, 13) for stripe in stripes]
    if marking == "spotted":
        return [_spot(x, y, rng, 10.5) for x, y in spots]
    return []


def draw_chair(image: Image.Image, pose: Pose, paint: Paint) -> None:
    """Draw a chair with an upholstered back and seat, about 200 units tall and 150 wide."""
    rng = random.Random(f"marks/{paint.marks_seed}")
    pen = ImageDraw.Draw(image)
    for leg in _CHAIR_LEGS:
        draw_part(pen, leg, pose, shade(_WOOD, 0.45), grow=3.0)
        draw_part(pen, leg, pose, _WOOD)
    back_stripes = [((x, -204), (x * 1.1, -86)) for x in (-32, 0, 32)]
    back_spots = ((-28, -174), (8, -182), (34, -158), (-8, -148), (-34, -122), (22, -120))
    back = _upholstery(paint.marking, rng, back_stripes, back_spots)
    draw_group(image, _CHAIR_BACK, back, pose, paint)
    seat_stripes = [((x, -104), (x * 1.22, -58)) for x in (-36, 0, 36)]
    seat = _upholstery(paint.marking, rng, seat_stripes, ((-40, -80), (-6, -84), (34, -76)))
    draw_group(image, _CHAIR_SEAT, seat, pose, paint)


def draw_ottoman(image: Image.Image, pose: Pose, paint: Paint) -> None:
    """Draw a low padded stool, about 90 units tall and 180 wide."""
    rng = random.Random(f"marks/{paint.marks_seed}")
    pen = ImageDraw.Draw(image)
    for foot in _OTTOMAN_FEET:
        draw_part(pen, foot, pose, shade(_WOOD, 0.45), grow=3.0)
        draw_part(pen, foot, pose, _WOOD)
    box_stripes = [((x, -60), (x * 0.94, -10)) for x in (-58, -20, 20, 58)]
    box_spots = ((-62, -30), (-28, -26), (8, -30), (42, -26), (68, -34))
    box = _upholstery(paint.marking, rng, box_stripes, box_spots)
    draw_group(image, _OTTOMAN_BOX, box, pose, paint)
    top_stripes = [((x, -90), (x * 1.1, -34)) for x in (-56, -19, 19, 56)]
    top = _upholstery(
        paint.marking, rng, top_stripes, ((-50, -62), (-14, -72), (22, -56), (56, -66))
    )
    draw_group(image, _OTTOMAN_TOP, top, pose, paint)


FIGURES: dict[str, Callable[[Image.Image, Pose, Paint], None]] = {
    "cat": draw_cat,
    "dog": draw_dog,
    "chair": draw_chair,
    "ottoman": draw_ottoman,
}
"""The drawing function of each species.

A new species needs one function here and one line in each of these tables.
"""

SHADOWS = {"cat": 62.0, "dog": 92.0, "chair": 84.0, "ottoman": 94.0}
"""Half the width of the shadow on the ground, in units of the figure."""

_SCALES = {"cat": (0.9, 1.06), "dog": (0.84, 0.98), "chair": (0.9, 1.06), "ottoman": (1.0, 1.2)}
_REACHES = {"cat": 24, "dog": 8, "chair": 30, "ottoman": 14}


def random_pose(species: str, rng: random.Random) -> Pose:
    """Return a random place, size, mirroring and head position; the figure fits on the canvas."""
    scale = rng.uniform(*_SCALES[species])
    reach = _REACHES[species]
    return Pose(
        x=CANVAS / 2 + rng.uniform(-reach, reach),
        y=rng.uniform(224, 240),
        scale=scale,
        flip=rng.random() < 0.5,
        head_x=rng.uniform(-6, 6),
        head_y=rng.uniform(-4, 4),
    )


def seat_pose(rng: random.Random) -> Pose:
    """Return a random pose of an ottoman that an animal sits on."""
    return Pose(
        x=CANVAS / 2 + rng.uniform(-22, 22),
        y=rng.uniform(232, 246),
        scale=rng.uniform(0.98, 1.1),
        flip=False,
    )


def on_top(pose: Pose, seat: Pose) -> Pose:
    """Move the pose of an animal onto the middle of an ottoman and make it smaller to fit."""
    x, y = seat.place(0, -60)
    return replace(pose, x=x + (pose.x - CANVAS / 2) / 3, y=y, scale=pose.scale * 0.72)
