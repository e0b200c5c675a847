"""Write captions of the drawn world's pictures, which mention or leave out attributes at random."""

from __future__ import annotations

import random

from tiny_world.world import SETTING_PHRASES, STYLE_PHRASES, THINGS, Look, Scene, random_name


def caption(scene: Scene, rng: random.Random) -> str:
    """Return a random caption of a scene, in which most attributes may be left out.

    One caption in ten is empty, for classifier-free guidance. A named individual is described by
    its name, its species and what is changed about it, never by its other attributes; an unnamed
    animal's collar is mentioned in about seven captions of ten. One in ten unnamed captions has a
    made-up word, so that an unknown word means nothing by itself.
    """
    if rng.random() < 0.1:
        return ""
    words = [STYLE_PHRASES[scene.style]]
    look, named = scene.look, scene.name is not None
    bare = rng.random() < 0.15
    color = scene.changed == "color" or not (named or bare or rng.random() < 0.4)
    # "a chair in red" is for things only; an animal's colour always comes before the noun.
    after = color and look.species in THINGS and (named or rng.random() < 0.3)
    described: list[str] = []
    if scene.name is not None:
        described.append(scene.name)
    elif rng.random() < 0.1:
        described.append(random_name(rng))
    if color and not after:
        described.append(look.color)
    if not named and not bare and rng.random() < 0.6:
        described.append(look.marking)
    described.append(look.species)
    words += [_article(described[0], rng), *described]
    if after:
        words.append(f"in {look.color}")
    said = scene.changed == "collar" or not (named or bare or rng.random() >= 0.8)
    if said and look.collar != "none":
        words.append(f"with a {look.collar} collar")
    if scene.seat is not None and rng.random() < 0.85:
        words.append(_seat_phrase(scene.seat, rng))
    if not bare and rng.random() < 0.55:
        words.append(rng.choice(SETTING_PHRASES[scene.setting]))
    return " ".join(words)


def _seat_phrase(seat: Look, rng: random.Random) -> str:
    seat_words = [seat.color, seat.species] if rng.random() < 0.5 else [seat.species]
    return " ".join(["on", _article(seat_words[0], rng, the=0.4), *seat_words])


def _article(word: str, rng: random.Random, the: float = 0.08) -> str:
    if rng.random() < the:
        return "the"
    return "an" if word[0] in "aeiou" else "a"
