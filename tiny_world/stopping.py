"""Compare rules for when to stop with constant numbers of steps, on the embedded model.

`python -m tiny_world stopping --out DIR --data dog2_4` trains once a seed and keeps a checkpoint at
every 50 steps. Each rule chooses one of them from the meter's readings of that run, and so does
each constant number of steps. The chosen states are drawn at the served defaults (guidance 7.5, 50
steps) and judged; their score is the harmonic mean of subject, context, class kept, other class
kept and clean, each from 0 to 1. What is finished is kept in DIR. Options that this command does
not have, such as `--training_guidance_scale 1.5`, are passed to the training job.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from scipy.stats import spearmanr

from dreambooth import tiny
from dreambooth.errors import UserError
from dreambooth.process import logs
from dreambooth.settings.command_line import Parser
from dreambooth.training import early_stopping
from dreambooth.training.meter import MeterReading
from tiny_world import fine_tunes, score, tables
from tiny_world.clean import Critic
from tiny_world.data_sets import DATA_SETS, DataSet
from tiny_world.fine_tunes import FineTune, Judging, Readings, Record

CONSTANT = (50, 100, 200, 400, 800)
CONVERGED = 0.4  # DVAR (arXiv 2302.04841, table 5)
EARLY = "early_stopping"
SIGNALS = ("loss", "drift_class", "drift_empty", "guidance", "convergence")


def by_rule(readings: Readings) -> int | None:
    """Return the step that early_stopping keeps; None where it goes to the end."""
    ended = early_stopping.decision(readings)
    return ended.kept if ended is not None else None


def by_convergence(readings: Readings) -> int | None:
    """Return the first step at which DVAR's criterion alone would stop."""
    converged = (one.step for one in readings if (one.convergence or 1.0) < CONVERGED)
    return next(converged, None)


def by_drift(readings: Readings) -> int | None:
    """Return the last step before the drift of a class alone would stop it."""
    calm = [replace(one, guidance=0.0) for one in readings]
    return by_rule(calm)


RULES: Mapping[str, Callable[[Readings], int | None]] = {
    EARLY: by_rule,
    "DVAR alone": by_convergence,
    "drift alone": by_drift,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The settings of a comparison; job: further options of every training job."""

    data: DataSet
    seeds: int
    steps: int
    learning_rate: float
    pictures: int
    job: tuple[str, ...]

    def fine_tune(self, seed: int) -> FineTune:
        """Return the fine-tune of a seed."""
        rate = ("--learning_rate", str(self.learning_rate))
        return FineTune(
            name=f"seed-{seed}",
            data=self.data,
            seed=seed,
            steps=self.steps,
            job=(*rate, *self.job),
        )


def nearest(step: int | None, steps: int) -> int:
    """Return the step of the kept state at or before this one; the last one for None."""
    if step is None:
        return steps
    every = min(fine_tunes.EVERY, steps)
    return max(every, step // every * every)


def constants(steps: int, states: Sequence[int]) -> dict[str, int]:
    """Return those of some constant numbers of steps, by name, that a run of `steps` passes.

    A run that passes none has its last step.
    """
    passed = [step for step in states if step <= steps]
    return {f"{step} steps": step for step in passed or [steps]}


def chosen(readings: Readings, steps: int) -> dict[str, int]:
    """Return the step that each rule and each constant chooses, by name."""
    by_rules = {name: nearest(rule(readings), steps) for name, rule in RULES.items()}
    return by_rules | constants(steps, CONSTANT)


def run(plan: Comparison, out: Path) -> list[Record]:
    """Return one record a seed: the readings, what was chosen, and the judged parts by step."""
    judging = Judging(
        questions=score.questions_on(plan.data.subject),
        pictures=plan.pictures,
        chosen=lambda readings: chosen(readings, plan.steps),
        measure=functools.partial(score.parts, critic=Critic.of_the_world()),
    )
    return [fine_tunes.judged(plan.fine_tune(seed), judging, out) for seed in range(plan.seeds)]


def as_markdown(records: Sequence[Record]) -> str:
    """Return the mean over seeds of each choice, and how each signal goes with the score."""
    rows = []
    for name in records[0]["chosen"]:
        steps = [record["chosen"][name] for record in records]
        found = [record["judged"][str(step)] for record, step in zip(records, steps, strict=True)]
        cells = [tables.cell([one[part] for one in found]) for part in score.PARTS]
        total = tables.cell([score.of_parts(one) for one in found])
        rows.append([name, ", ".join(map(str, dict.fromkeys(steps))), *cells, total])
    choices = tables.markdown(["", "steps", *score.PARTS, "score"], rows)
    signals = [[name, f"{value:.2f}"] for name, value in correlations(records).items()]
    ranked = tables.markdown(["signal", "rank correlation with the score, all states"], signals)
    return f"{choices}\n\n{ranked}" if signals else choices


def readings_of(record: Record) -> list[MeterReading]:
    """Return the meter's readings of a run."""
    return [MeterReading.from_json(one) for one in record["readings"]]


def correlations(records: Sequence[Record]) -> dict[str, float]:
    """Return Spearman's rank correlation of each signal with the score, over all judged states.

    A state has the figures of the last reading before it.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        readings = readings_of(record)
        for step, parts in record["judged"].items():
            before = [one for one in readings if one.step <= int(step)]
            for signal, value in (before[-1].figures() if before else {}).items():
                if signal in SIGNALS:
                    points.setdefault(signal, []).append((value, score.of_parts(parts)))
    return {
        signal: float(spearmanr(*zip(*pairs, strict=True)).statistic)
        for signal, pairs in points.items()
        if all(len(set(values)) > 1 for values in zip(*pairs, strict=True))
    }


def read_plan(argv: Sequence[str] | None) -> tuple[Comparison, Path, int]:
    """Return the settings of the comparison, its output folder and the number of threads."""
    parser = Parser(prog="python -m tiny_world stopping", description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where results are kept")
    parser.add_argument("--data", default="dog1_8", choices=[each.folder for each in DATA_SETS])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=max(CONSTANT))
    rate = float(tiny.DEFAULTS["learning_rate"])
    parser.add_argument("--learning_rate", type=float, default=rate)
    parser.add_argument("--pictures", type=int, default=32, help="of each prompt")
    parser.add_argument("--threads", type=int, default=1)
    known, rest = parser.parse_known_args(argv)
    if known.steps % fine_tunes.EVERY:
        raise UserError(
            f"--steps must be a multiple of {fine_tunes.EVERY}, at which states are kept."
        )
    plan = Comparison(
        data=next(each for each in DATA_SETS if each.folder == known.data),
        seeds=known.seeds,
        steps=known.steps,
        learning_rate=known.learning_rate,
        pictures=known.pictures,
        job=tuple(rest),
    )
    return plan, known.out, known.threads


def main(argv: Sequence[str] | None = None) -> int:
    """Compare rules for when to stop with constant numbers of steps."""
    plan, out, threads = read_plan(argv)
    logs.to_stderr("warning")
    torch.set_num_threads(threads)
    settings = json.loads(json.dumps(asdict(plan)))
    del settings["seeds"]
    fine_tunes.keep_settings(out / "stopping.json", settings)
    print(as_markdown(run(plan, out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
