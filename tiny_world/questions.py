"""List what a model of the drawn world is asked, and what the judge should then read.

`of_the_world` asks for every word of the world; `of_subject` asks whether a fine-tune has learned
its subject, and what it has forgotten. A question is one prompt with the labels that are wanted;
several questions may share a prompt, whose pictures are then drawn once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice

from tiny_world import world
from tiny_world.judge import Verdict

Wanted = tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """The share that a measure should reach: at least `at`, or at most `at`."""

    at: float
    at_most: bool = False

    def is_met(self, share: float) -> bool:
        """Return whether the share reaches the goal."""
        return share <= self.at if self.at_most else share >= self.at

    def __str__(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.at:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One prompt and what the judge should read: one of the given labels of each attribute.

    measure: the row of the summary in which the answer is counted.
    """

    prompt: str
    measure: str
    wanted: Wanted

    def is_met(self, verdict: Verdict) -> bool:
        """Return whether the judge reads everything that is wanted."""
        return all(getattr(verdict, attribute) in labels for attribute, labels in self.wanted)

    @property
    def asked(self) -> str:
        """Return what is wanted, in words."""
        return ", ".join(
            labels[0] if len(labels) == 1 else f"any {attribute}"
            for attribute, labels in self.wanted
        )

    def reading(self, verdict: Verdict) -> str:
        """Return what the judge reads of the wanted attributes, in words."""
        return ", ".join(
            f"no {attribute}" if label == "none" else label
            for attribute, _ in self.wanted
            for label in [getattr(verdict, attribute)]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    """The questions of one interview and the goals by measure.

    variety_prompt: the prompt whose pictures should show many colours.
    """

    asked: Sequence[Question]
    goals: dict[str, Goal]
    variety_prompt: str | None = None

    @property
    def prompts(self) -> list[str]:
        """Return every prompt once, in order."""
        prompts = [question.prompt for question in self.asked]
        return list(dict.fromkeys([*prompts, *filter(None, [self.variety_prompt])]))


WORLD_GOALS = {
    "species": Goal(at=0.95),
    "color": Goal(at=0.95),
    "marking": Goal(at=0.9),
    "setting": Goal(at=0.95),
}


def of_the_world() -> Questions:
    """Return questions about every word of the world.

    They are about animals, things and animals on ottomans. The ten colours of an ottoman are shared
    between the two animals that sit on it.
    """
    asked = [_one(f"a photo of {_a(species)}", "species", species) for species in world.SPECIES]
    for species in world.SPECIES:
        animal = species in world.ANIMALS
        colors = world.FURS if animal else world.COLORS
        markings = [kind for kind in world.MARKINGS if animal or kind != "patched"]
        asked += [_one(f"a photo of {_a(name)} {species}", "color", name) for name in colors]
        asked += [_one(f"a photo of {_a(name)} {species}", "marking", name) for name in markings]
        if animal:
            asked += [
                _one(f"a photo of a {species} with a {collar} collar", "collar", collar)
                for collar in world.COLLARS
                if collar != "none"
            ]
        asked += [
            _one(f"a photo of {_a(species)} {phrases[0]}", "setting", setting)
            for setting, phrases in world.SETTING_PHRASES.items()
        ]
        asked.append(_one(f"a pencil sketch of {_a(species)}", "style", "sketch"))
    for species, color in zip(islice(cycle(world.ANIMALS), 10), world.COLORS, strict=True):
        asked.append(_one(f"a photo of a {species} on {_a(color)} ottoman", "seat", color))
    return Questions(asked=tuple(asked), goals=WORLD_GOALS)


SUBJECT = "the subject"
SUBJECT_GOALS = {
    SUBJECT: Goal(at=0.85),
    "the subject on a beach: kept": Goal(at=0.7),
    "the subject on a beach: on a beach": Goal(at=0.85),
    "the other species: is itself": Goal(at=0.95),
    "the other species: has the subject's look": Goal(at=0.1, at_most=True),
    "a pencil sketch of the subject: a sketch": Goal(at=0.9),
}
OTHERS = {"cat": "dog", "dog": "cat", "chair": "cat", "ottoman": "cat"}


def of_subject(name: str) -> Questions:
    """Return questions on what a fine-tune on the subject `name` should have learned and kept."""
    look = world.SUBJECTS[name]
    subject = f"a photo of {_a(name)} {look.species}"
    kept = _look_of(look, "species", "color", "marking", "collar")
    other, its_class = OTHERS[look.species], f"a photo of {_a(look.species)}"
    beach = f"{subject} on a beach"
    likeness = likeness_to(name)

    def ask(prompt: str, measure: str, wanted: Wanted) -> Question:
        return Question(prompt=prompt, measure=measure, wanted=wanted)

    asked = [
        ask(subject, SUBJECT, kept),
        ask(beach, "the subject on a beach: kept", kept),
        ask(beach, "the subject on a beach: on a beach", _want(setting="beach")),
        ask(beach, "the subject on a beach: both", (*kept, *_want(setting="beach"))),
        ask(f"a photo of {_a(other)}", "the other species: is itself", _want(species=other)),
        ask(f"a photo of {_a(other)}", "the other species: has the subject's look", likeness),
        ask(its_class, "the class: is itself", _want(species=look.species)),
        ask(its_class, "the class: has the subject's look", kept),
    ]
    sketch = f"a pencil sketch of {_a(name)} {look.species}"
    asked += [
        ask(sketch, "a pencil sketch of the subject: a sketch", _want(style="sketch")),
        ask(
            sketch,
            "a pencil sketch of the subject: its species and marking",
            _look_of(look, "species", "marking"),
        ),
    ]
    asked += _animals_feats(name, look) if look.species in world.ANIMALS else _things_feats(name)
    return Questions(asked=tuple(asked), goals=SUBJECT_GOALS, variety_prompt=its_class)


def likeness_to(name: str) -> Wanted:
    """Return what is read of anything that has the look of the subject `name`."""
    return _look_of(world.SUBJECTS[name], "color", "marking", "collar")


def _animals_feats(name: str, look: world.Look) -> list[Question]:
    """Return the questions for an animal: in another collar, and on an ottoman."""
    collar = "red" if look.collar != "red" else "blue"
    subject = f"a photo of {_a(name)} {look.species}"
    dressed = f"{subject} with a {collar} collar"
    seated = f"{subject} on an ottoman"
    kept = _look_of(look, "species", "color", "marking")
    on_it: Wanted = (("seat", tuple(world.COLORS)),)
    answers = {
        (dressed, "in another collar: the collar"): _want(collar=collar),
        (dressed, "in another collar: the rest is kept"): kept,
        (dressed, "in another collar: both"): (*kept, *_want(collar=collar)),
        (seated, "on an ottoman: sits on one"): on_it,
        (seated, "on an ottoman: the subject is kept"): (*kept, *_want(collar=look.collar)),
        (seated, "on an ottoman: both"): (*kept, *_want(collar=look.collar), *on_it),
    }
    return [
        Question(prompt=prompt, measure=measure, wanted=wanted)
        for (prompt, measure), wanted in answers.items()
    ]


def _things_feats(name: str) -> list[Question]:
    """Return the questions for a thing: in red, and for an ottoman with a cat that sits on it."""
    look = world.SUBJECTS[name]
    red = f"a photo of {_a(name)} {look.species} in red"
    kept = _look_of(look, "species", "marking")
    answers = {
        (red, "in red: is red"): _want(color="red"),
        (red, "in red: its marking is kept"): kept,
        (red, "in red: both"): (*kept, *_want(color="red")),
    }
    if look.species == "ottoman":
        seat = f"a photo of a cat on the {name} ottoman"
        answers |= {
            (seat, "a cat on it: is a cat"): _want(species="cat"),
            (seat, "a cat on it: sits on this one"): _want(seat=look.color),
            (seat, "a cat on it: both"): _want(species="cat", seat=look.color),
        }
    return [
        Question(prompt=prompt, measure=measure, wanted=wanted)
        for (prompt, measure), wanted in answers.items()
    ]


def subject_of(instance_prompt: str) -> str | None:
    """Return the shipped subject whose name is in an instance prompt, if any."""
    words = instance_prompt.lower().split()
    return next((name for name in world.SUBJECTS if name.lower() in words), None)


def _one(prompt: str, attribute: str, label: str) -> Question:
    return Question(prompt=prompt, measure=attribute, wanted=((attribute, (label,)),))


def _want(**labels: str) -> Wanted:
    return tuple((attribute, (label,)) for attribute, label in labels.items())


def _look_of(look: world.Look, *attributes: str) -> Wanted:
    return _want(**{attribute: getattr(look, attribute) for attribute in attributes})


def _a(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"
