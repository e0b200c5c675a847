"""Prior preservation: none, class images, prior prediction, at equal fidelity of the subject.

The published advice: off for pets and things, where it has little effect; on for human faces.

Each way needs another number of steps to learn the subject, so equal steps would compare how far
each has come. Of each run that state counts in which the subject's share first reaches ENOUGH.
"""

from __future__ import annotations

import operator

from tiny_world import answers, priors, questions, score, tables
from tiny_world.asking import Interview
from tiny_world.clean import Critic
from tiny_world.fine_tunes import FineTune, Record
from tiny_world.studies import frame
from tiny_world.studies.frame import Findings, Results, Scale, Study

ENOUGH = questions.SUBJECT_GOALS[questions.SUBJECT].at
WAYS = {
    "prior_off": "no prior preservation",
    "prior_on": "class images",
    "prior_prediction": "prior prediction",
}
_RATE = ("--learning_rate", "1e-4")  # that of the measurements before guided training
_DATA = frame.SHIPPED["dog1_8"]
_COLORS = "colours of the class"
_EACH = 3  # pictures of each prompt on the sheet


class Prior(Study):
    """The three ways on dog 1's 8 pictures."""

    name = "prior"
    scale = Scale(seeds=3, pictures=32, steps=600)
    states = (50, 100, 200, 300, 400, 600)

    def fine_tunes(self, scale: Scale) -> list[FineTune]:
        """Return one run for each way and seed."""
        return [_run(way, seed, scale.steps) for way in WAYS for seed in range(scale.seeds)]

    def measure(self, tune: FineTune, interview: Interview, critic: Critic) -> dict[str, float]:
        """Return the parts of the score, and the entropy in bits of the class's colours."""
        read = interview.verdicts[tune.data.class_prompt]
        bits = answers.entropy_bits(verdict.color for verdict in read if verdict is not None)
        return {**score.parts(interview, critic), _COLORS: bits}

    def findings(self, results: Results) -> Findings:
        """Return the ways at equal fidelity, and each part of the score by steps."""
        rows, shown = [], []
        prompts = score.prompts_of(_DATA.subject)
        for way, label in WAYS.items():
            records = results.of_seeds(way)
            steps = [equal_step(record) for record in records]
            found = [record["judged"][str(n)] for record, n in zip(records, steps, strict=True)]
            cells = [tables.cell([one[part] for one in found]) for part in score.PARTS]
            bits = tables.cell([one[_COLORS] for one in found], most=float("inf"))
            rows.append([label, ", ".join(map(str, steps)), *cells, bits])
            tune = _run(way, 0, results.scale.steps)
            pictures = [
                picture
                for prompt in prompts
                for picture in frame.sheet_row(results, self, tune, prompt, steps[:1], _EACH)
            ]
            shown.append((f"{label}, {steps[0]} steps", pictures))
        head = ["", "steps of each seed", *score.PARTS, f"{_COLORS}, bits"]
        return Findings(
            table=tables.markdown(head, rows),
            note=f"Each run at its first judged state with {ENOUGH:g} of the subject or more, else "
            "at that with most.",
            sheet=frame.sheet(shown, prompts),
            sheet_says=f"The four prompts once the subject reaches {ENOUGH:g}, seed 0",
            figure=_figure(results),
            figure_says="Each part of the score by steps, mean over the seeds",
        )


def _run(way: str, seed: int, steps: int) -> FineTune:
    job = (*_RATE, *priors.CONDITIONS[way])
    return FineTune(name=f"{way}-{seed}", data=_DATA, seed=seed, steps=steps, job=job)


def equal_step(record: Record) -> int:
    """Return the first judged step at which the subject reaches ENOUGH; else its best one."""
    shares = {int(step): parts["subject"] for step, parts in record["judged"].items()}
    reached = (step for step, share in shares.items() if share >= ENOUGH)
    return next(reached, max(shares, key=lambda step: shares[step]))


def _figure(results: Results) -> str:
    panels = []
    for part in ("subject", "class kept", "other class kept", "clean"):
        curves = [
            frame.mean_curve(label, results.of_seeds(way), operator.itemgetter(part))
            for way, label in WAYS.items()
        ]
        panels.append((part, curves, ()))
    return frame.figure(panels, across=2)
