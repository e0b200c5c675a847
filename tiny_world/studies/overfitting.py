"""Overfitting: dog 1 with 16 pictures, states from 50 to 800 steps, and the step to stop at.

The published observation: the subject gets better with steps, in a new setting up to a point; then
its class is forgotten, and in the end other classes too.
"""

from __future__ import annotations

from collections.abc import Mapping

from dreambooth.report.charts import Series
from tiny_world import score, stopping
from tiny_world.fine_tunes import FineTune, Readings
from tiny_world.studies import frame
from tiny_world.studies.frame import Findings, Results, Scale, Study

_EACH = 2  # pictures of each prompt and state on the sheet
_CURVES = {"loss": "loss", "drift_class": "drift of the class", "guidance": "guidance"}


class Overfitting(Study):
    """One long run a seed, judged at constant steps and where each rule would stop."""

    name = "overfitting"
    scale = Scale(seeds=3, pictures=32, steps=800)

    def fine_tunes(self, scale: Scale) -> list[FineTune]:
        """Return one run a seed."""
        data = frame.SHIPPED["dog1_16"]
        return [
            FineTune(name=f"seed-{seed}", data=data, seed=seed, steps=scale.steps, job=frame.DEMO)
            for seed in range(scale.seeds)
        ]

    def chosen(self, tune: FineTune, readings: Readings) -> Mapping[str, int]:
        """Return the step of each rule and of each constant."""
        return stopping.chosen(readings, tune.steps)

    def findings(self, results: Results) -> Findings:
        """Return the table of `stopping`, the four prompts by step, and the meter's curves."""
        records = results.of_seeds("seed")
        tune = self.fine_tunes(results.scale)[0]
        columns = stopping.constants(tune.steps, stopping.CONSTANT)
        early = records[0]["chosen"][stopping.EARLY]
        columns[f"early stopping: {early}"] = early
        steps = list(columns.values())
        rows = [
            (prompt, frame.sheet_row(results, self, tune, prompt, steps, _EACH))
            for prompt in score.prompts_of(tune.data.subject)
        ]
        return Findings(
            table=stopping.as_markdown(records),
            note=frame.SCORE_NOTE,
            sheet=frame.sheet(rows, list(columns)),
            sheet_says="The four prompts after more and more steps, seed 0",
            figure=_figure(results),
            figure_says="The score and the meter's curves; marked: where early stopping stops",
        )


def _figure(results: Results) -> str:
    """Return the score and the meter's curves, a line a seed."""
    records = results.of_seeds("seed")
    chosen = {record["chosen"][stopping.EARLY] for record in records}
    marks = [
        (step, f"stop at {step}" if step < results.scale.steps else "no stop")
        for step in sorted(chosen)
    ]
    scores = [
        Series(
            label=f"seed {number}",
            x=[int(step) for step in record["judged"]],
            y=[score.of_parts(parts) for parts in record["judged"].values()],
        )
        for number, record in enumerate(records)
    ]
    panels = [("score", scores, marks)]
    for name, title in _CURVES.items():
        curves = [
            Series(
                label=f"seed {number}",
                x=[reading.step for reading in readings],
                y=[reading.figures()[name] for reading in readings],
            )
            for number, readings in enumerate(map(stopping.readings_of, records))
        ]
        panels.append((title, curves, marks))
    return frame.figure(panels, across=2)
