from __future__ import annotations

import random

import numpy as np
import pytest

from dreambooth.tiny import world


def scene(setting: str = "beach", style: str = "photo", **look: str) -> world.Scene:
    base = world.random_look(random.Random(1))
    changed = {"species": "cat", "fur": "black", "marking": "plain", "collar": "red", **look}
    plain = world.Look(coat=base.coat, mark=base.mark, marks_seed=base.marks_seed, **changed)
    return world.Scene(look=plain, setting=setting, style=style, seed="a scene")


def array(what: world.Scene) -> np.ndarray:
    return np.asarray(world.draw(what), dtype=np.int16)


def test_a_seed_draws_the_same_picture_and_another_seed_another() -> None:
    first, again, other = (world.random_scene(seed) for seed in ("7", "7", "8"))
    assert first == again
    assert world.draw(first).size == (64, 64)
    assert (array(first) == array(again)).all()
    assert (array(first) != array(other)).any()


@pytest.mark.parametrize("attribute", ["species", "marking", "collar"])
def test_every_attribute_is_seen_in_the_picture(attribute: str) -> None:
    choices = {"species": world.SPECIES, "marking": world.MARKINGS, "collar": tuple(world.COLLARS)}
    pictures = [array(scene(**{attribute: choice})) for choice in choices[attribute]]
    for index, picture in enumerate(pictures):
        for other in pictures[:index]:
            assert (np.abs(picture - other).max(axis=-1) > 60).sum() > 40


def test_settings_and_styles_change_the_background() -> None:
    pictures = [array(scene(setting=name)) for name in world.SETTINGS]
    pictures.append(array(scene(style="sketch")))
    for index, picture in enumerate(pictures):
        for other in pictures[:index]:
            assert np.abs(picture - other).mean() > 10


def test_a_sketch_has_no_colour() -> None:
    picture = array(scene(style="sketch"))
    assert (picture.max(axis=-1) == picture.min(axis=-1)).all()


def test_captions_say_what_is_seen_and_nothing_else() -> None:
    rng = random.Random(0)
    shown = scene(fur="orange", marking="striped", collar="blue", species="dog")
    captions = [world.caption(shown, rng) for _ in range(400)]
    said = {word for caption in captions for word in caption.split()}
    assert {"orange", "striped", "blue", "dog", "beach", "photo"} <= said
    assert not said & {"cat", "gray", "spotted", "red", "snow", "sketch"}
    assert 0.05 < captions.count("") / len(captions) < 0.16
    collars = sum("blue collar" in caption for caption in captions) / len(captions)
    assert 0.5 < collars < 0.75


def test_a_named_animal_is_called_by_name_and_species_alone() -> None:
    shown = world.random_scene("x", world.random_look(random.Random(3)), "tofit")
    species = shown.look.species
    for caption in (world.caption(shown, random.Random(seed)) for seed in range(50)):
        assert caption == "" or f" of a tofit {species}" in caption
        assert not set(caption.split()) & {*world.FURS, *world.MARKINGS, "collar"}


def test_no_held_out_subject_is_ever_named_in_training() -> None:
    held_out = {look.combination for look in world.SUBJECTS.values()}
    named = world.individuals(400, 0)
    assert len({name for name, _ in named}) == 400
    assert not {look.combination for _, look in named} & held_out
    assert not {name for name, _ in named} & {name.lower() for name in world.SUBJECTS}
    assert not {name for name, _ in named} & set(world.WORDS)


def test_an_individual_has_one_look_in_every_picture() -> None:
    scenes = [scene for scene in world.corpus(3, 5, 4, 0) if scene.name is not None]
    assert len(scenes) == 20
    for shown in scenes:
        assert shown.look == dict(world.individuals(5, 0))[shown.name or ""]
