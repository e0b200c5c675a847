from __future__ import annotations

from dataclasses import replace

import pytest

from dreambooth.tiny import WEIGHTS
from tiny_world import questions, tokenizer, world
from tiny_world.data_sets import DATA_SETS
from tiny_world.judge import ATTRIBUTES, Verdict
from tiny_world.questions import Goal, Question, Questions

RIOBUGGER = Verdict(
    species="cat",
    color="black",
    marking="patched",
    collar="yellow",
    seat="none",
    setting="room",
    style="photo",
)


def met(asked: Questions, verdict: Verdict) -> set[str]:
    return {question.measure for question in asked.asked if question.is_met(verdict)}


def test_every_label_of_the_world_is_asked_for() -> None:
    asked = {
        (attribute, label)
        for question in questions.of_the_world().asked
        for attribute, labels in question.wanted
        for label in labels
    }
    every = {(name, label) for name, labels in ATTRIBUTES.items() for label in labels}
    # Captions never mention these.
    unsaid = {("collar", "none"), ("seat", "none"), ("style", "photo")}
    assert asked == every - unsaid


def test_goals_are_of_measures_that_are_asked() -> None:
    for asked in (questions.of_the_world(), *map(questions.of_subject, world.SUBJECTS)):
        measures = {question.measure for question in asked.asked}
        assert asked.goals.keys() <= measures
        assert len(asked.prompts) == len(set(asked.prompts))
        assert {question.prompt for question in asked.asked} <= set(asked.prompts)


@pytest.mark.parametrize("name", [None, *world.SUBJECTS])
def test_every_word_of_a_prompt_is_a_word_of_the_world(name: str | None) -> None:
    from transformers import CLIPTokenizer

    asked = questions.of_the_world() if name is None else questions.of_subject(name)
    words = CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer")
    for prompt in asked.prompts:
        assert set(prompt.split()) <= {*world.WORDS, name}
        assert len(words(prompt).input_ids) <= tokenizer.MAX_LENGTH


def test_the_subject_is_all_of_its_look_at_once() -> None:
    asked = questions.of_subject("riobugger")
    assert questions.SUBJECT in met(asked, RIOBUGGER)
    for change in ({"species": "dog"}, {"color": "gray"}, {"marking": "plain"}, {"collar": "red"}):
        assert questions.SUBJECT not in met(asked, replace(RIOBUGGER, **change))


def test_another_species_that_wears_the_subjects_look_is_a_leak() -> None:
    asked = questions.of_subject("riobugger")
    leak = "the other species: has the subject's look"
    assert leak in met(asked, replace(RIOBUGGER, species="dog"))
    assert leak not in met(asked, replace(RIOBUGGER, species="dog", marking="spotted"))
    assert "the other species: is itself" in met(asked, replace(RIOBUGGER, species="dog"))
    assert questions.SUBJECT_GOALS[leak].at_most


def test_seats_and_collars_of_an_animal() -> None:
    asked = questions.of_subject("riobugger")
    seated = replace(RIOBUGGER, seat="green")
    assert {"on an ottoman: sits on one", "on an ottoman: both"} <= met(asked, seated)
    assert not {"on an ottoman: sits on one", "on an ottoman: both"} & met(asked, RIOBUGGER)
    assert "in another collar: both" in met(asked, replace(RIOBUGGER, collar="red"))
    assert "in another collar: both" not in met(asked, RIOBUGGER)
    red = {q.prompt for q in questions.of_subject("zwx").asked if "collar" in q.prompt}
    assert red == {"a photo of a zwx dog with a blue collar"}  # its own collar is red


def test_things_are_asked_for_in_red_and_as_a_seat() -> None:
    chair = questions.of_subject("vorbit")
    red = replace(RIOBUGGER, species="chair", marking="striped", color="red", collar="none")
    assert "in red: both" in met(chair, red)
    assert "in red: both" not in met(chair, replace(red, marking="plain"))
    assert "a photo of a vorbit chair in red" in chair.prompts
    ottoman = questions.of_subject("drimel")
    assert "a photo of a cat on the drimel ottoman" in ottoman.prompts
    assert "a cat on it: both" in met(ottoman, replace(RIOBUGGER, seat="green"))
    assert "a cat on it: both" not in met(ottoman, replace(RIOBUGGER, seat="red"))


def test_a_question_says_what_it_asks_and_what_was_read() -> None:
    question = Question(
        prompt="a photo of a cat on an ottoman",
        measure="seat",
        wanted=(("species", ("cat",)), ("seat", tuple(world.COLORS))),
    )
    assert question.asked == "cat, any seat"
    assert question.reading(RIOBUGGER) == "cat, no seat"


@pytest.mark.parametrize("data_set", DATA_SETS, ids=lambda data_set: data_set.folder)
def test_a_shipped_subject_is_known_by_its_instance_prompt(data_set: object) -> None:
    assert questions.subject_of(data_set.instance_prompt) == data_set.subject  # type: ignore[attr-defined]


def test_other_prompts_name_no_subject() -> None:
    assert questions.subject_of("a photo of a cat") is None
    assert questions.subject_of("") is None


def test_goals_are_met_from_their_own_side() -> None:
    assert Goal(at=0.9).is_met(0.9)
    assert not Goal(at=0.9).is_met(0.89)
    assert Goal(at=0.1, at_most=True).is_met(0.1)
    assert not Goal(at=0.1, at_most=True).is_met(0.11)
    assert (str(Goal(at=0.9)), str(Goal(at=0.1, at_most=True))) == (">= 0.9", "<= 0.1")
