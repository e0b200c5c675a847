"""The published feats: the chair in red, a cat on the ottoman, a pencil sketch.

Each asks for something that the pictures never showed, so each may be lost when training goes on.
"""

from __future__ import annotations

from tiny_world import score, stopping, tables
from tiny_world.asking import Interview
from tiny_world.clean import Critic
from tiny_world.fine_tunes import FineTune
from tiny_world.questions import SUBJECT, Questions
from tiny_world.studies import frame
from tiny_world.studies.frame import Findings, Results, Scale, Study

_SKETCH = "a pencil sketch of the subject: "
_SKETCHES = {
    f"{_SKETCH}a sketch": "a sketch",
    f"{_SKETCH}its species and marking": "its species and marking",
}
ASKED = {
    "chair": {
        "a photo of a vorbit chair": {SUBJECT: "the chair"},
        "a photo of a vorbit chair in red": {"in red: both": "the chair, and red"},
        "a pencil sketch of a vorbit chair": _SKETCHES,
    },
    "ottoman": {
        "a photo of a drimel ottoman": {SUBJECT: "the ottoman"},
        "a photo of a cat on the drimel ottoman": {"a cat on it: both": "a cat, on this ottoman"},
        "a pencil sketch of a drimel ottoman": _SKETCHES,
    },
    "cat": {
        "a photo of a riobugger cat": {SUBJECT: "the cat"},
        "a photo of a riobugger cat on an ottoman": {
            "on an ottoman: both": "the cat, on an ottoman"
        },
        "a pencil sketch of a riobugger cat": _SKETCHES,
    },
}
"""The prompts of each data set, each with the measures of `questions` that are shown and their
labels."""
_EACH = 3  # pictures of each prompt and state on the sheet


class Feats(Study):
    """The chair, the ottoman and the cat, each asked for what it was never shown as."""

    name = "feats"
    scale = Scale(seeds=3, pictures=32, steps=400)
    states = (50, 100, 200, 400)

    def fine_tunes(self, scale: Scale) -> list[FineTune]:
        """Return one run for each subject and seed."""
        return [_run(folder, seed, scale.steps) for folder in ASKED for seed in range(scale.seeds)]

    def questions(self, tune: FineTune) -> Questions:
        """Return the questions about the subject's feats."""
        return score.asked_of(tune.data.subject, tuple(ASKED[tune.data.folder]))

    def measure(self, tune: FineTune, interview: Interview, critic: Critic) -> dict[str, float]:
        """Return the share of each measure of the questions."""
        return {name: share.value for name, share in interview.answers.by_measure().items()}

    def findings(self, results: Results) -> Findings:
        """Return the share of each feat by steps, and its pictures."""
        columns = stopping.constants(results.scale.steps, self.states)
        steps = list(columns.values())
        rows, shown = [], []
        for folder, asked in ASKED.items():
            records = results.of_seeds(folder)
            for prompt, measures in asked.items():
                for measure, label in measures.items():
                    cells = [
                        tables.cell([one["judged"][str(step)][measure] for one in records])
                        for step in steps
                    ]
                    rows.append([f'"{prompt}"', label, *cells])
                tune = _run(folder, 0, results.scale.steps)
                shown.append((prompt, frame.sheet_row(results, self, tune, prompt, steps, _EACH)))
        return Findings(
            table=tables.markdown(["prompt", "share that shows", *columns], rows),
            note="Trained as the demo trains.",
            sheet=frame.sheet(shown, list(columns)),
            sheet_says="The published feats after more and more steps, seed 0",
        )


def _run(folder: str, seed: int, steps: int) -> FineTune:
    data = frame.SHIPPED[folder]
    return FineTune(name=f"{folder}-{seed}", data=data, seed=seed, steps=steps, job=frame.DEMO)
