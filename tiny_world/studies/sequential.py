"""One subject after the other: what is left of the earlier one.

The published observation: after dog 1 and then dog 2 all pictures look like dog 2, and the other
way round; after a cat and then dog 1, cat prompts give the cat and dog prompts dog 1.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace

from tiny_world import answers, questions, score, tables
from tiny_world.asking import Interview
from tiny_world.clean import Critic
from tiny_world.fine_tunes import FineTune, Readings
from tiny_world.questions import Question, Questions
from tiny_world.studies import frame
from tiny_world.studies.frame import Findings, Results, Scale, Study

CHAINS = {
    ("dog1_8", "dog2_4"): "dog 1, then dog 2",
    ("dog2_4", "dog1_8"): "dog 2, then dog 1",
    ("cat", "dog1_8"): "the cat, then dog 1",
}
"""The data sets of the earlier and of the new subject."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BothRuns:
    """How both runs are trained.

    first: what it is called in the names of first runs, which ways with the same job share.
    """

    name: str
    first: str
    job: tuple[str, ...]
    keep_subjects: str
    label: str


WAYS = (
    BothRuns(
        name="off",
        first="plain",
        job=(*frame.RATE, "--with_prior_preservation", "False"),
        keep_subjects="False",
        label="no prior preservation, as published",
    ),
    BothRuns(
        name="demo",
        first="prediction",
        job=frame.DEMO,
        keep_subjects="False",
        label="as the demo trains, without keep_subjects",
    ),
    BothRuns(
        name="kept",
        first="prediction",
        job=frame.DEMO,
        keep_subjects="True",
        label="as the demo trains, with keep_subjects",
    ),
)
COLUMNS = {
    "earlier subject": "after",
    "earlier as new": "with the new one's look",
    "new subject": "the new subject",
    "new as earlier": "with the earlier one's look",
    "earlier class kept": "the earlier one's class kept",
    "new class kept": "the new one's class kept",
    "clean": "clean",
}
_EACH = 3  # pictures of each prompt on the sheet


class Sequential(Study):
    """Two runs, the second of which starts from the first one's model."""

    name = "sequential"
    scale = Scale(seeds=3, pictures=32, steps=200)

    def fine_tunes(self, scale: Scale) -> list[FineTune]:
        """Return each first run once, and behind them the second ones."""
        second = [
            _second_run(chain, way, seed, scale.steps)
            for seed in range(scale.seeds)
            for chain in CHAINS
            for way in WAYS
        ]
        first = [tune.base for tune in second if tune.base is not None]
        return [*{tune.name: tune for tune in first}.values(), *second]

    def chosen(self, tune: FineTune, readings: Readings) -> Mapping[str, int]:
        """Return the last step."""
        return {"end": tune.steps}

    def questions(self, tune: FineTune) -> Questions:
        """Return the questions on the subject, and on the earlier one if there is one."""
        own = score.questions_on(tune.data.subject)
        if tune.base is None:
            return own
        earlier = score.questions_on(tune.base.data.subject)
        return replace(own, asked=(*earlier.asked, *own.asked))

    def measure(self, tune: FineTune, interview: Interview, critic: Critic) -> dict[str, float]:
        """Return the parts of the score, of a second run those of both subjects."""
        if tune.base is None:
            return score.parts(interview, critic)
        first, second = tune.base.data.subject, tune.data.subject
        earlier = score.parts(_about(first, interview), critic)
        new = score.parts(_about(second, interview), critic)
        return {
            "earlier subject": earlier["subject"],
            "earlier as new": _mistaken(first, second, interview),
            "new subject": new["subject"],
            "new as earlier": _mistaken(second, first, interview),
            "earlier class kept": earlier["class kept"],
            "new class kept": new["class kept"],
            "clean": statistics.fmean((earlier["clean"], new["clean"])),
        }

    def findings(self, results: Results) -> Findings:
        """Return a row for each chain and way, in the table and on the sheet."""
        rows, shown = [], []
        steps = results.scale.steps
        for chain, order in CHAINS.items():
            for way in WAYS:
                one = _second_run(chain, way, 0, steps)
                assert one.base is not None  # of a second run
                before = _at_the_end(results, one.base)
                after = _at_the_end(results, one)
                cells = [tables.cell([parts[key] for parts in after]) for key in COLUMNS]
                start = tables.cell([parts["subject"] for parts in before])
                rows.append([f"{order}: {way.label}", start, *cells])
                old, new = one.base.data.instance_prompt, one.data.instance_prompt
                drawn = [(one.base, old), (one, old), (one, new), (one, one.data.class_prompt)]
                pictures = [
                    picture
                    for tune, prompt in drawn
                    for picture in frame.sheet_row(results, self, tune, prompt, [steps], _EACH)
                ]
                shown.append((f"{order}: {way.label}", pictures))
        heads = ("the earlier subject, before", "after", "the new subject", "its class")
        return Findings(
            table=tables.markdown(["", "the earlier subject, before", *COLUMNS.values()], rows),
            note=f"{steps} steps for each subject.",
            sheet=frame.sheet(shown, heads),
            sheet_says="The earlier subject before and after, the new one and its class, seed 0",
        )


def _second_run(chain: tuple[str, str], way: BothRuns, seed: int, steps: int) -> FineTune:
    """Return the run on the new subject, with the first run as its base."""
    earlier, new = chain
    base = FineTune(
        name=f"{way.first}-{earlier}-{seed}",
        data=frame.SHIPPED[earlier],
        seed=seed,
        steps=steps,
        job=way.job,
        is_base=True,
    )
    return FineTune(
        name=f"{way.name}-{earlier}-{new}-{seed}",
        data=frame.SHIPPED[new],
        seed=seed,
        steps=steps,
        job=(*way.job, "--keep_subjects", way.keep_subjects),
        base=base,
    )


def _at_the_end(results: Results, tune: FineTune) -> list[Mapping[str, float]]:
    """Return what was measured of a fine-tune's last state, one a seed."""
    records = results.of_seeds(tune.name.rpartition("-")[0])
    return [record["judged"][str(tune.steps)] for record in records]


def _about(subject: str, interview: Interview) -> Interview:
    """Return the part of an interview that is about one of its subjects."""
    asked = score.questions_on(subject)
    pictures = {prompt: interview.pictures[prompt] for prompt in asked.prompts}
    counted = answers.count(asked, interview.verdicts)
    return replace(interview, questions=asked, pictures=pictures, answers=counted)


def _mistaken(name: str, other: str, interview: Interview) -> float:
    """Return the share of the drawings of one subject that have the look of the other one."""
    prompt = score.prompts_of(name)[0]
    asked = Question(prompt=prompt, measure="", wanted=questions.likeness_to(other))
    (found,) = answers.count(Questions(asked=(asked,), goals={}), interview.verdicts).shares
    return found[1].value
