"""The drawn world: who exists in it, what a picture of it shows, and what its caption says.

A picture is one animal in one setting, 64x64 RGB. Everything follows from a seed: the same seed
gives the same pictures and captions on any machine with the same Pillow. Three subjects
(`SUBJECTS`) are held out: their names and their combinations of species, coat, marking and collar
are never given to a named individual of the training set, so a fine-tune has something to learn.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

from dreambooth.tiny.brush import SIZE, Paint, Rgb, draw_shadow, pencil
from dreambooth.tiny.figures import FIGURES, random_pose
from dreambooth.tiny.settings import SETTINGS as PAINTERS
from dreambooth.tiny.settings import paint_setting

SPECIES = tuple(FIGURES)
FURS: dict[str, Rgb] = {
    "black": (40, 38, 46),
    "white": (246, 245, 242),
    "gray": (142, 145, 154),
    "brown": (122, 72, 38),
    "orange": (240, 134, 28),
    "cream": (244, 214, 148),
}
MARKINGS = ("plain", "spotted", "striped", "patched")
COLLARS: dict[str, Rgb | None] = {
    "none": None,
    "red": (222, 30, 40),
    "blue": (34, 66, 220),
    "green": (16, 150, 62),
    "yellow": (255, 214, 20),
}
SETTINGS = tuple(PAINTERS)
STYLES = ("photo", "sketch")

_MARK_COLORS: dict[str, tuple[Rgb, ...]] = {
    "black": ((246, 245, 242), (240, 134, 28)),
    "white": ((40, 38, 46), (150, 84, 40)),
    "gray": ((40, 40, 48), (248, 248, 248)),
    "brown": ((244, 232, 206), (40, 26, 20)),
    "orange": ((252, 250, 246), (96, 46, 16)),
    "cream": ((110, 62, 30), (60, 52, 52)),
}
SETTING_PHRASES: dict[str, tuple[str, ...]] = {
    "beach": ("on a beach", "on the beach"),
    "grass": ("in the grass", "on the grass"),
    "snow": ("in the snow",),
    "room": ("in a room", "in the room"),
    "street": ("on a street", "on the street"),
    "studio": ("in a studio",),
}
_STYLE_PHRASES: dict[str, str] = {"photo": "a photo of", "sketch": "a pencil sketch of"}
WORDS: tuple[str, ...] = tuple(
    dict.fromkeys(
        " ".join(
            [
                *_STYLE_PHRASES.values(),
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
"""Every word that a caption may hold (and a few kept for later things): one token each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """One animal: what can be said of it (species, fur, marking, collar) and its exact colours and
    marks.
    """

    species: str
    fur: str
    marking: str
    collar: str
    coat: Rgb
    mark: Rgb
    marks_seed: int

    @property
    def combination(self) -> tuple[str, str, str, str]:
        """What a caption can say of it."""
        return self.species, self.fur, self.marking, self.collar


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One picture: an animal in a setting and a style; `seed` fixes pose and detail."""

    look: Look
    setting: str
    style: str
    seed: str
    name: str | None = None


SUBJECTS: dict[str, Look] = {
    "riobugger": Look(
        species="cat",
        fur="black",
        marking="patched",
        collar="yellow",
        coat=(42, 40, 48),
        mark=(246, 245, 242),
        marks_seed=3,
    ),
    "Doppler": Look(
        species="dog",
        fur="orange",
        marking="patched",
        collar="blue",
        coat=(238, 130, 30),
        mark=(252, 250, 246),
        marks_seed=5,
    ),
    "zwx": Look(
        species="dog",
        fur="gray",
        marking="spotted",
        collar="red",
        coat=(146, 148, 156),
        mark=(38, 38, 46),
        marks_seed=7,
    ),
}
"""The held-out subjects of the shipped data sets, by their rare word."""


def draw(scene: Scene) -> Image.Image:
    """The scene as a 64x64 RGB picture."""
    rng = random.Random(f"scene/{scene.seed}")
    image = paint_setting(scene.setting, rng)
    pose = random_pose(scene.look.species, rng)
    draw_shadow(image, pose, 62 if scene.look.species == "cat" else 92)
    look = scene.look
    paint = Paint(
        coat=look.coat,
        mark=look.mark,
        bandana=COLLARS[look.collar],
        marking=look.marking,
        marks_seed=look.marks_seed,
    )
    FIGURES[look.species](image, pose, paint)
    if scene.style == "sketch":
        image = pencil(image)
    return image.reduce(image.width // SIZE)


def random_look(rng: random.Random) -> Look:
    """Any animal of the world; its coat varies by up to 10 of 255 per channel."""
    fur = rng.choice(list(FURS))
    jitter = [rng.randint(-10, 10) for _ in range(3)]
    red, green, blue = (
        max(0, min(255, channel + shift)) for channel, shift in zip(FURS[fur], jitter, strict=True)
    )
    return Look(
        species=rng.choice(SPECIES),
        fur=fur,
        marking=rng.choice(MARKINGS),
        collar=rng.choice(list(COLLARS)),
        coat=(red, green, blue),
        mark=rng.choice(_MARK_COLORS[fur]),
        marks_seed=rng.randrange(1 << 30),
    )


def random_name(rng: random.Random) -> str:
    """A made-up word of three to nine letters that is no word of the world and no held-out name."""
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
    """`count` named animals, each of a fixed look; nothing held out is among them."""
    rng = random.Random(f"individuals/{seed}")
    held_out = {look.combination for look in SUBJECTS.values()}
    found: dict[str, Look] = {}
    while len(found) < count:
        name, look = random_name(rng), random_look(rng)
        if look.combination not in held_out:
            found.setdefault(name, look)
    return list(found.items())


def random_scene(seed: str, look: Look | None = None, name: str | None = None) -> Scene:
    """A scene: what is not given is random; one in eight is a pencil sketch."""
    rng = random.Random(f"random scene/{seed}")
    return Scene(
        look=look if look is not None else random_look(rng),
        setting=rng.choice(SETTINGS),
        style="sketch" if rng.random() < 0.125 else "photo",
        seed=seed,
        name=name,
    )


def caption(scene: Scene, rng: random.Random) -> str:
    """What is said of a scene: each attribute may be left out; one in ten says nothing (for
    guidance).

    A named animal is called by its name and species alone. Collars are named in seven of ten
    captions of those who wear one. One in ten unnamed captions carries a made-up word, so that an
    unknown word means nothing by itself.
    """
    if rng.random() < 0.1:
        return ""
    words = [_STYLE_PHRASES[scene.style]]
    look = scene.look
    bare = rng.random() < 0.15
    described: list[str] = []
    if scene.name is not None:
        described.append(scene.name)
    else:
        if rng.random() < 0.1:
            described.append(random_name(rng))
        if not bare and rng.random() < 0.6:
            described.append(look.fur)
        if not bare and rng.random() < 0.6:
            described.append(look.marking)
    described.append(look.species)
    words.append("an" if described[0][0] in "aeiou" else "a")
    words += described
    if scene.name is None and not bare and look.collar != "none" and rng.random() < 0.8:
        words.append(f"with a {look.collar} collar")
    if not bare and rng.random() < 0.55:
        words.append(rng.choice(SETTING_PHRASES[scene.setting]))
    return " ".join(words)


def corpus(count: int, named: int, pictures_each: int, seed: int) -> Iterator[Scene]:
    """The training set: `count` scenes of anybody, then `pictures_each` of each of `named`
    individuals.
    """
    for index in range(count):
        yield random_scene(f"{seed}/{index}")
    for name, look in individuals(named, seed):
        for index in range(pictures_each):
            yield random_scene(f"{seed}/{name}/{index}", look, name)
