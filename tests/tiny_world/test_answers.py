from __future__ import annotations

import pytest
from scipy.stats import binomtest

from tiny_world import answers, questions
from tiny_world.answers import Share
from tiny_world.judge import Verdict


def verdict(**seen: str) -> Verdict:
    nothing = dict.fromkeys(("color", "marking", "collar", "seat", "setting", "style"), "none")
    return Verdict(**{"species": "cat", **nothing, **seen})


@pytest.mark.parametrize(("right", "of"), [(0, 256), (3, 16), (128, 256), (250, 256), (256, 256)])
def test_the_interval_is_wilsons(right: int, of: int) -> None:
    reference = binomtest(right, of).proportion_ci(method="wilson")
    assert Share(right=right, of=of).interval == pytest.approx((reference.low, reference.high))


def test_nothing_was_asked_and_nothing_is_known() -> None:
    assert Share(right=0, of=0).interval == (0.0, 1.0)
    assert Share(right=0, of=0).value == 0.0


def test_entropy_is_zero_for_one_colour_and_log2_for_many() -> None:
    assert answers.entropy_bits(["black"] * 9) == 0.0
    assert answers.entropy_bits([*"abcd"] * 3) == pytest.approx(2.0)
    assert answers.entropy_bits([]) == 0.0


def test_pictures_are_counted_by_question_and_measure_and_lost_ones_are_wrong() -> None:
    asked = questions.of_subject("riobugger")
    subject = verdict(color="black", marking="patched", collar="yellow")
    other = verdict(color="white")
    read = {prompt: [subject, subject, other, None] for prompt in asked.prompts}
    counted = answers.count(asked, read)
    measures = counted.by_measure()
    assert measures[questions.SUBJECT] == Share(right=2, of=4)
    assert measures["the class: is itself"] == Share(right=3, of=4)
    assert counted.variety_bits == pytest.approx(answers.entropy_bits("bbw"))


def test_questions_of_one_measure_are_pooled() -> None:
    asked = questions.of_the_world()
    read = {prompt: [verdict(species=prompt.split()[-1])] * 2 for prompt in asked.prompts}
    measures = answers.count(asked, read).by_measure()
    assert measures["species"] == Share(right=8, of=8)
    assert measures["setting"] == Share(right=0, of=2 * 4 * 6)
