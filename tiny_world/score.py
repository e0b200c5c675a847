"""Score a fine-tune of the drawn world by five parts of four prompts, each from 0 to 1.

The prompts: the subject, the subject on a beach, its class, and another class.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import replace

from tiny_world import questions, world
from tiny_world.asking import Interview
from tiny_world.clean import Critic
from tiny_world.questions import Questions

PARTS = ("subject", "context", "class kept", "other class kept", "clean")


def prompts_of(subject: str) -> tuple[str, str, str, str]:
    """Return the four prompts."""
    everything = questions.of_subject(subject)
    own = everything.variety_prompt
    assert own is not None  # the class prompt
    named = everything.asked[0].prompt
    other = f"a photo of a {questions.OTHERS[world.SUBJECTS[subject].species]}"
    return named, f"{named} on a beach", own, other


def questions_on(subject: str) -> Questions:
    """Return the questions that the four prompts are asked."""
    return asked_of(subject, prompts_of(subject))


def asked_of(subject: str, prompts: tuple[str, ...]) -> Questions:
    """Return the questions on a subject that are about some prompts."""
    everything = questions.of_subject(subject)
    asked = tuple(one for one in everything.asked if one.prompt in prompts)
    return replace(everything, asked=asked, variety_prompt=None)


def parts(interview: Interview, critic: Critic) -> dict[str, float]:
    """Return the parts of the score, of an interview with `questions_on` a subject."""
    by_measure = interview.answers.by_measure()
    shares = {measure: share.value for measure, share in by_measure.items()}
    clean = [critic.clean_share(pictures) for pictures in interview.pictures.values()]
    return {
        "subject": shares[questions.SUBJECT],
        "context": shares["the subject on a beach: on a beach"],
        "class kept": shares["the class: is itself"]
        * (1 - shares["the class: has the subject's look"]),
        "other class kept": shares["the other species: is itself"]
        * (1 - shares["the other species: has the subject's look"]),
        "clean": statistics.fmean(clean),
    }


def of_parts(found: Mapping[str, float]) -> float:
    """Return the score, the harmonic mean of the parts; 0 if one of them is."""
    return statistics.harmonic_mean([found[part] for part in PARTS])
