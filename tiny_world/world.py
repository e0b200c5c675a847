"""Define the drawn world: its animals and things, its words, and the scenes that are drawn.

A picture shows one animal or one piece of furniture in one setting, 64x64 RGB; an animal may sit on
an ottoman. Everything follows from a seed: the same seed gives the same pictures on any
machine with the same Pillow. The subjects (`SUBJECTS`) are held out: their names and their
combinations of species, colour, marking and collar are never given to a named individual of the
training set, so they are new to the model that is fine-tuned.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from PIL import Image, ImageChops

from tiny_world.brush import SIZE, Paint, Pose, Rgb, draw_shadow, pencil
from tiny_world.figures import FIGURES, SHADOWS, on_top, random_pose, seat_pose
from tiny_world.settings import SETTINGS as PAINTERS
from tiny_world.settings import paint_setting

SPECIES = tuple(FIGURES)
ANIMALS, THINGS = ("cat", "dog"), ("chair", "ottoman")
FURS: dict[str, Rgb] = {
    "black": (40, 38, 46),
    "white": (246, 245, 242),
    "gray": (142, 145, 154),
    "brown": (122, 72, 38),
    "orange": (240, 134, 28),
    "cream": (244, 214, 148),
}
COLORS: dict[str, Rgb] = {
    **FURS,
    "red": (222, 30, 40),
    "blue": (34, 66, 220),
    "green": (16, 150, 62),
    "yellow": (255, 214, 20),
}
"""The colours of the world's things; animals have one of the first six, `FURS`."""
MARKINGS = ("plain", "spotted", "striped", "patched")
COLLARS: dict[str, Rgb | None] = {
    "none": None,
    **{name: COLORS[name] for name in ("red", "blue", "green", "yellow")},
}
SETTINGS = tuple(PAINTERS)
_SAME = 6  # levels of 255 that a mask takes for no difference
STYLES = ("photo", "sketch")

_MARK_COLORS: dict[str, tuple[Rgb, ...]] = {
    "black": ((246, 245, 242), (240, 134, 28)),
    "white": ((40, 38, 46), (150, 84, 40)),
    "gray": ((40, 40, 48), (248, 248, 248)),
    "brown": ((244, 232, 206), (40, 26, 20)),
    "orange": ((252, 250, 246), (96, 46, 16)),
    "cream": ((110, 62, 30), (60, 52, 52)),
    "red": ((250, 240, 225), (70, 10, 20)),
    "blue": ((245, 245, 250), (250, 210, 60)),
    "green": ((240, 245, 225), (12, 60, 34)),
    "yellow": ((70, 66, 60), (250, 250, 250)),
}
SETTING_PHRASES: dict[str, tuple[str, ...]] = {
    "beach": ("on a beach", "on the beach"),
    "grass": ("in the grass", "on the grass"),
    "snow": ("in the snow",),
    "room": ("in a room", "in the room"),
    "street": ("on a street", "on the street"),
    "studio": ("in a studio",),
}
STYLE_PHRASES: dict[str, str] = {"photo": "a photo of", "sketch": "a pencil sketch of"}
WORDS: tuple[str, ...] = tuple(
    dict.fromkeys(
        " ".join(
            [
                *STYLE_PHRASES.values(),
                *SPECIES,
                *FURS,
                *MARKINGS,
                *(name for name in COLLARS if name != "none"),
                "with a collar",
                *(phrase for phrases in SETTING_PHRASES.values() for phrase in phrases),
                "an chair ottoman pot wearing sitting next to and",
            ]
        ).split()
    )
)
"""Every word that a caption may contain, and a few for later use; each is one token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """The look of one animal or thing.

    It consists of what a caption can mention (species, colour, marking, collar) and of the exact
    colours and marks.
    """

    species: str
    color: str
    marking: str
    collar: str
    coat: Rgb
    mark: Rgb
    marks_seed: int

    @property
    def combination(self) -> tuple[str, str, str, str]:
        """Return the attributes that a caption can mention."""
        return self.species, self.color, self.marking, self.collar


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One picture: an animal or a thing in a setting and a style.

    seed: determines pose and detail. seat: the ottoman that the animal sits on, if any. changed:
    the attribute ("collar" or "color") in which a named individual differs from its usual look, so
    that a caption must mention it.
    """

    look: Look
    setting: str
    style: str
    seed: str
    name: str | None = None
    seat: Look | None = None
    changed: str | None = None


SUBJECTS: dict[str, Look] = {
    "riobugger": Look(
        species="cat",
        color="black",
        marking="patched",
        collar="yellow",
        coat=(42, 40, 48),
        mark=(246, 245, 242),
        marks_seed=3,
    ),
    "Doppler": Look(
        species="dog",
        color="orange",
        marking="patched",
        collar="blue",
        coat=(238, 130, 30),
        mark=(252, 250, 246),
        marks_seed=5,
    ),
    "zwx": Look(
        species="dog",
        color="gray",
        marking="spotted",
        collar="red",
        coat=(146, 148, 156),
        mark=(38, 38, 46),
        marks_seed=7,
    ),
    "vorbit": Look(
        species="chair",
        color="white",
        marking="striped",
        collar="none",
        coat=(246, 245, 242),
        mark=(40, 38, 46),
        marks_seed=11,
    ),
    "drimel": Look(
        species="ottoman",
        color="green",
        marking="spotted",
        collar="none",
        coat=(16, 150, 62),
        mark=(240, 245, 225),
        marks_seed=13,
    ),
}
"""The held-out subjects of the shipped data sets, by their rare word."""


def draw(scene: Scene) -> Image.Image:
    """Draw the scene as a 64x64 RGB picture."""
    rng = random.Random(f"scene/{scene.seed}")
    image = paint_setting(scene.setting, rng)
    pose = random_pose(scene.look.species, rng)
    if scene.seat is not None:
        seat = seat_pose(rng)
        _draw_figure(image, scene.seat, seat)
        pose = on_top(pose, seat)
        _draw_figure(image, scene.look, pose, shadow=False)
    else:
        _draw_figure(image, scene.look, pose)
    if scene.style == "sketch":
        image = pencil(image)
    return image.reduce(image.width // SIZE)


def draw_mask(scene: Scene) -> Image.Image:
    """Return where the scene differs from its empty setting: white there, mode L, 64x64."""
    rng = random.Random(f"scene/{scene.seed}")
    empty = paint_setting(scene.setting, rng)
    empty = empty.reduce(empty.width // SIZE)
    difference = ImageChops.difference(draw(scene).convert("RGB"), empty.convert("RGB"))
    strongest = functools.reduce(ImageChops.lighter, difference.split())
    return strongest.point(lambda level: 255 if level > _SAME else 0)


def _draw_figure(image: Image.Image, look: Look, pose: Pose, shadow: bool = True) -> None:
    if shadow:
        draw_shadow(image, pose, SHADOWS[look.species])
    paint = Paint(
        coat=look.coat,
        mark=look.mark,
        bandana=COLLARS[look.collar],
        marking=look.marking,
        marks_seed=look.marks_seed,
    )
    FIGURES[look.species](image, pose, paint)


def _jittered(color: str, rng: random.Random) -> Rgb:
    """Return a colour of the world, changed at random by at most 10 of 255 in each channel."""
    red, green, blue = (
        max(0, min(255, channel + rng.randint(-10, 10))) for channel in COLORS[color]
    )
    return red, green, blue


def random_look(rng: random.Random, species: str | None = None) -> Look:
    """Return a random animal (three in four) or thing, or one of the given species."""
    if species is None:
        species = rng.choice(ANIMALS if rng.random() < 0.75 else THINGS)
    animal = species in ANIMALS
    color = rng.choice(list(FURS if animal else COLORS))
    return Look(
        species=species,
        color=color,
        marking=rng.choice([kind for kind in MARKINGS if animal or kind != "patched"]),
        collar=rng.choice(list(COLLARS)) if animal else "none",
        coat=_jittered(color, rng),
        mark=rng.choice(_MARK_COLORS[color]),
        marks_seed=rng.randrange(1 << 30),
    )


def random_name(rng: random.Random) -> str:
    """Return a made-up word of three to nine letters, no word of the world or held-out name."""
    taken = {*WORDS, *(name.lower() for name in SUBJECTS)}
    while True:
        if rng.random() < 0.25:
            name = "".join(rng.choice("bcdfghjklmnpqrstvwxz") for _ in range(3))
        else:
            syllables = rng.randint(2, 3)
            name = "".join(
                rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(syllables)
            ) + rng.choice(["", *"bdgklmnprstx"])
            name = name.replace("u", rng.choice(("u", "ugg", "u")), 1)[:9]
        if name not in taken:
            return name


def individuals(count: int, seed: int) -> list[tuple[str, Look]]:
    """Return `count` named individuals, each with a fixed look that is not held out."""
    rng = random.Random(f"individuals/{seed}")
    held_out = {look.combination for look in SUBJECTS.values()}
    found: dict[str, Look] = {}
    while len(found) < count:
        name, look = random_name(rng), random_look(rng)
        if look.combination not in held_out:
            found.setdefault(name, look)
    return list(found.items())


def random_scene(seed: str, look: Look | None = None, name: str | None = None) -> Scene:
    """Return a scene in which everything that is not given is random.

    One in eight is a pencil sketch, and one animal in eight sits on an ottoman. About one named
    individual in eight differs from its usual look: an animal wears another collar, a thing has
    another colour.
    """
    rng = random.Random(f"random scene/{seed}")
    look = look if look is not None else random_look(rng)
    changed = None
    if name is not None and rng.random() < 0.12:
        look, changed = _changed(look, rng)
    return Scene(
        look=look,
        setting=rng.choice(SETTINGS),
        style="sketch" if rng.random() < 0.125 else "photo",
        seed=seed,
        name=name,
        seat=random_look(rng, "ottoman") if _sits(look, rng) else None,
        changed=changed,
    )


def _sits(look: Look, rng: random.Random) -> bool:
    return look.species in ANIMALS and rng.random() < 0.125


def _changed(look: Look, rng: random.Random) -> tuple[Look, str]:
    if look.species in ANIMALS:
        others = [name for name in COLLARS if name not in ("none", look.collar)]
        return replace(look, collar=rng.choice(others)), "collar"
    color = rng.choice([name for name in COLORS if name != look.color])
    mark = rng.choice(_MARK_COLORS[color])
    return replace(look, color=color, coat=_jittered(color, rng), mark=mark), "color"


def corpus(count: int, named: int, pictures_each: int, seed: int) -> Iterator[Scene]:
    """Yield the scenes of the training set.

    `count` scenes without a name come first, then `pictures_each` of each of `named` individuals.
    """
    for index in range(count):
        yield random_scene(f"{seed}/{index}")
    for name, look in individuals(named, seed):
        for index in range(pictures_each):
            yield random_scene(f"{seed}/{name}/{index}", look, name)
