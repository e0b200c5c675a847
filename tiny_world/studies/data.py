"""How many pictures, which learning rate, how many steps: one figure to choose by.

The published observation: 4 pictures suffice, and 4 and 16 both adapt to the subject; a low
learning rate, and 200 to 400 steps for pets and things.
"""

from __future__ import annotations

from tiny_world import score, stopping, tables
from tiny_world.data_sets import DataSet
from tiny_world.fine_tunes import FineTune
from tiny_world.studies import frame
from tiny_world.studies.frame import Findings, Results, Scale, Study

PICTURES = (4, 8, 16)
RATES = ("5e-5", "1e-4", "3e-4")
_SUBJECT = "Doppler"
_EACH = 2  # pictures of each state on the sheet


class Data(Study):
    """Dog 1 with its first pictures, at each learning rate."""

    name = "data"
    scale = Scale(seeds=2, pictures=16, steps=800)

    def fine_tunes(self, scale: Scale) -> list[FineTune]:
        """Return one run for each number of pictures, learning rate and seed."""
        return [
            _run(pictures, rate, seed, scale.steps)
            for pictures in PICTURES
            for rate in RATES
            for seed in range(scale.seeds)
        ]

    def findings(self, results: Results) -> Findings:
        """Return the score by steps, and the subject on a beach."""
        beach = score.prompts_of(_SUBJECT)[1]
        columns = stopping.constants(results.scale.steps, self.states)
        rows, shown = [], []
        for pictures in PICTURES:
            for rate in RATES:
                records = results.of_seeds(_stem(pictures, rate))
                cells = [
                    tables.cell([score.of_parts(one["judged"][str(step)]) for one in records])
                    for step in columns.values()
                ]
                rows.append([str(pictures), rate, *cells])
                tune = _run(pictures, rate, 0, results.scale.steps)
                steps = list(columns.values())
                drawn = frame.sheet_row(results, self, tune, beach, steps, _EACH)
                shown.append((f"{pictures} pictures, {rate}", drawn))
        return Findings(
            table=tables.markdown(["pictures", "learning rate", *columns], rows),
            note="In the cells: the score, the harmonic mean of the five parts.",
            sheet=frame.sheet(shown, list(columns)),
            sheet_says=f'"{beach}" by pictures, learning rate and steps, seed 0',
            figure=_figure(results),
            figure_says="The score by steps for each learning rate, mean over the seeds",
        )


def _run(pictures: int, rate: str, seed: int, steps: int) -> FineTune:
    return FineTune(
        name=f"{_stem(pictures, rate)}-{seed}",
        data=DataSet(folder=f"dog1_{pictures}", subject=_SUBJECT, pictures=pictures),
        seed=seed,
        steps=steps,
        job=("--learning_rate", rate, *frame.METHOD),
    )


def _stem(pictures: int, rate: str) -> str:
    return f"{pictures}-pictures-{rate}"


def _figure(results: Results) -> str:
    """Return a panel for each learning rate with a line for each number of pictures."""
    panels = [
        (
            f"score at {rate}",
            [
                frame.mean_curve(
                    f"{pictures} pictures",
                    results.of_seeds(_stem(pictures, rate)),
                    score.of_parts,
                )
                for pictures in PICTURES
            ],
            (),
        )
        for rate in RATES
    ]
    return frame.figure(panels, across=len(RATES))
