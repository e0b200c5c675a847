from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import numpy as np
import pytest

from tiny_world import captions as captioning
from tiny_world import world


def scene(setting: str = "beach", style: str = "photo", **look: str) -> world.Scene:
    base = world.random_look(random.Random(1))
    changed = {"species": "cat", "color": "black", "marking": "plain", "collar": "red", **look}
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
    shown = scene(color="orange", marking="striped", collar="blue", species="dog")
    captions = [captioning.caption(shown, rng) for _ in range(400)]
    said = {word for caption in captions for word in caption.split()}
    assert {"orange", "striped", "blue", "dog", "beach", "photo"} <= said
    assert not said & {"cat", "gray", "spotted", "red", "snow", "sketch"}
    assert 0.05 < captions.count("") / len(captions) < 0.16
    collars = sum("blue collar" in caption for caption in captions) / len(captions)
    assert 0.5 < collars < 0.75


def a_scene(wanted: Callable[[world.Scene], bool], name: str | None = "tofit") -> world.Scene:
    """Return the first random scene of an individual called `name` that meets `wanted`."""
    rng = random.Random(3)
    for seed in range(2000):
        shown = world.random_scene(str(seed), world.random_look(rng), name)
        if wanted(shown):
            return shown
    raise AssertionError("no such scene")


def captions_of(shown: world.Scene, count: int = 60) -> list[str]:
    every = [captioning.caption(shown, random.Random(seed)) for seed in range(count)]
    return [caption for caption in every if caption]


def test_an_individual_is_called_by_name_and_species_alone() -> None:
    shown = a_scene(lambda scene: scene.changed is None and scene.seat is None)
    for caption in captions_of(shown):
        assert f" of a tofit {shown.look.species}" in caption.replace("the tofit", "a tofit")
        assert not set(caption.split()) & {*world.COLORS, *world.MARKINGS, "collar"}


def test_what_is_changed_about_an_individual_is_always_said() -> None:
    dressed = a_scene(lambda scene: scene.changed == "collar" and scene.seat is None)
    assert dressed.look.species in world.ANIMALS
    for caption in captions_of(dressed):
        assert f"with a {dressed.look.collar} collar" in caption
    painted = a_scene(lambda scene: scene.changed == "color")
    assert painted.look.species in world.THINGS
    for caption in captions_of(painted):
        assert f"tofit {painted.look.species} in {painted.look.color}" in caption


def test_only_animals_sit_and_captions_mostly_say_on_what() -> None:
    seated = a_scene(lambda scene: scene.seat is not None, name=None)
    assert seated.seat is not None
    assert seated.look.species in world.ANIMALS
    said = captions_of(seated, 200)
    on_it = [caption for caption in said if " ottoman" in caption]
    assert 0.7 < len(on_it) / len(said) < 0.95
    assert any(f" {seated.seat.color} ottoman" in caption for caption in on_it)
    alone = dataclasses.replace(seated, seat=None)
    assert (np.abs(array(seated) - array(alone)).max(axis=-1) > 60).sum() > 200


@pytest.mark.parametrize("species", world.SPECIES)
def test_every_look_is_one_that_its_species_can_have(species: str) -> None:
    looks = [world.random_look(random.Random(seed), species) for seed in range(300)]
    animal = species in world.ANIMALS
    assert {look.species for look in looks} == {species}
    assert {look.color for look in looks} == set(world.FURS if animal else world.COLORS)
    assert {look.marking for look in looks} == {
        kind for kind in world.MARKINGS if animal or kind != "patched"
    }
    assert {look.collar for look in looks} == (set(world.COLLARS) if animal else {"none"})


def test_no_held_out_subject_is_ever_named_in_training() -> None:
    held_out = {look.combination for look in world.SUBJECTS.values()}
    named = world.individuals(400, 0)
    assert len({name for name, _ in named}) == 400
    assert not {look.combination for _, look in named} & held_out
    assert not {name for name, _ in named} & {name.lower() for name in world.SUBJECTS}
    assert not {name for name, _ in named} & set(world.WORDS)


def test_an_individual_has_one_look_but_for_what_is_changed() -> None:
    scenes = [scene for scene in world.corpus(3, 5, 40, 0) if scene.name is not None]
    assert len(scenes) == 200
    looks = dict(world.individuals(5, 0))
    changed = [scene for scene in scenes if scene.changed is not None]
    assert 5 < len(changed) < 50
    for shown in scenes:
        usual = looks[shown.name or ""]
        if shown.changed is None:
            assert shown.look == usual
        else:
            assert getattr(shown.look, shown.changed) != getattr(usual, shown.changed)
            assert shown.look.marks_seed == usual.marks_seed
