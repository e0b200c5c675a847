"""Compare rules for when to stop with constant numbers of steps, on the embedded model.

`python -m tiny_world stopping --out DIR --data dog2_4` trains once a seed and keeps a checkpoint at
every 50 steps. Each rule chooses one of them from the meter's readings of that run, and so does
each constant number of steps. The chosen states are drawn at the served defaults (guidance 7.5, 50
steps) and judged; their score is the harmonic mean of subject, context, class kept, other class
kept and clean, each from 0 to 1. What is finished is kept in DIR. Options that this command does
not have, such as `--training_guidance_scale 1.5`, are passed to the training job.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr

from dreambooth import tiny
from dreambooth.errors import UserError
from dreambooth.job.run import run_job
from dreambooth.model_folder import layout
from dreambooth.process import logs
from dreambooth.settings.command_line import Parser
from dreambooth.training import early_stopping
from dreambooth.training.meter import MeterReading
from tiny_world import asking, questions, study, world
from tiny_world.clean import Critic
from tiny_world.data_sets import DATA_SETS, DataSet

EVERY = 50
CONSTANT = (50, 100, 200, 400, 800)
CONVERGED = 0.4  # DVAR (arXiv 2302.04841, table 5)
PARTS = ("subject", "context", "class kept", "other class kept", "clean")
SIGNALS = ("loss", "drift_class", "drift_empty", "guidance", "convergence")

Readings = Sequence[MeterReading]


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
    "early_stopping": by_rule,
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

    def constants(self) -> list[int]:
        """Return the constant numbers of steps that are compared."""
        return [step for step in CONSTANT if step <= self.steps]


def harmonic_mean(parts: Mapping[str, float]) -> float:
    """Return the harmonic mean of shares, 0 if one of them is."""
    return statistics.harmonic_mean(list(parts.values()))


def nearest(step: int | None, steps: int) -> int:
    """Return the step of the kept checkpoint at or before this one; the last one for None."""
    if step is None:
        return steps
    return max(EVERY, step // EVERY * EVERY)


def chosen(readings: Readings, plan: Comparison) -> dict[str, int]:
    """Return the step that each rule and each constant chooses, by name."""
    found = {name: nearest(rule(readings), plan.steps) for name, rule in RULES.items()}
    return found | {f"{step} steps": step for step in plan.constants()}


def run(plan: Comparison, out: Path) -> list[dict[str, Any]]:
    """Return one record a seed: the readings, what was chosen, and the judged parts by step."""
    critic, records = Critic.of_the_world(), []
    for seed in range(plan.seeds):
        path = out / f"seed-{seed}.json"
        if not path.exists():
            record = _record(plan, out / f"seed-{seed}", seed, critic)
            path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            shutil.rmtree(out / f"seed-{seed}")
        records.append(json.loads(path.read_text(encoding="utf-8")))
    return records


def _record(plan: Comparison, folder: Path, seed: int, critic: Critic) -> dict[str, Any]:
    model = folder / "model"
    if not (model / layout.INDEX).exists():
        _fine_tune(plan, folder, seed)
    manifest = folder / "checkpoints" / f"step-{plan.steps:08d}" / "manifest.json"
    raw = json.loads(manifest.read_text(encoding="utf-8"))["readings"]
    picks = chosen([MeterReading.from_json(one) for one in raw], plan)
    judged = {}
    for step in sorted({*picks.values()}):
        state = folder / "checkpoints" / f"step-{step:08d}" / "unet.safetensors"
        shutil.copyfile(state, model / "unet" / "diffusion_pytorch_model.safetensors")
        judged[step] = judge(model, plan, critic, label=f"seed {seed}, step {step}")
    return {"readings": raw, "chosen": picks, "judged": judged}


def _fine_tune(plan: Comparison, folder: Path, seed: int) -> None:
    code = run_job(
        [
            *("--pretrained-model", "tiny", "--train", str(tiny.DATA / plan.data.folder)),
            *("--model_dir", str(folder / "model"), "--output_data_dir", str(folder / "output")),
            *("--checkpoint_dir", str(folder / "checkpoints"), "--seed", str(seed)),
            *("--checkpointing_steps", str(EVERY)),
            *("--checkpoints_total_limit", str(plan.steps // EVERY)),
            *("--keep_last_checkpoint", "True", "--max_steps", str(plan.steps)),
            *("--learning_rate", str(plan.learning_rate), "--meter_pictures_share", "0"),
            *plan.job,
        ],
        os.environ,
    )
    if code != 0:
        raise UserError(f"The fine-tune in {folder} ended with exit code {code}; see above.")


def judge(model: Path, plan: Comparison, critic: Critic, *, label: str) -> dict[str, float]:
    """Return the parts of the score of a model folder."""
    subject, own, other = prompts_of(plan.data)
    beach = f"{subject} on a beach"
    everything = questions.of_subject(plan.data.subject)
    asked = [one for one in everything.asked if one.prompt in (subject, beach, own, other)]
    wanted = replace(everything, asked=tuple(asked), variety_prompt=None)
    settings = asking.Settings(
        pictures=plan.pictures,
        guidance_scale=study.SAMPLINGS["7.5"][0],
        num_inference_steps=study.SAMPLINGS["7.5"][1],
        seed=0,
        batch_size=16,
    )
    interview = asking.ask(model, wanted, settings, label=label)
    by_measure = interview.answers.by_measure()
    shares = {measure: share.right / share.of for measure, share in by_measure.items()}
    clean = [critic.clean_share(interview.pictures[prompt]) for prompt in wanted.prompts]
    return {
        "subject": shares[questions.SUBJECT],
        "context": shares["the subject on a beach: on a beach"],
        "class kept": shares["the class: is itself"]
        * (1 - shares["the class: has the subject's look"]),
        "other class kept": shares["the other species: is itself"]
        * (1 - shares["the other species: has the subject's look"]),
        "clean": statistics.fmean(clean),
    }


def prompts_of(data: DataSet) -> tuple[str, str, str]:
    """Return the prompts of the subject, its class and another class."""
    species = world.SUBJECTS[data.subject].species
    return data.instance_prompt, data.class_prompt, f"a photo of a {questions.OTHERS[species]}"


def print_tables(records: Sequence[Mapping[str, Any]]) -> None:
    """Print the mean over seeds of each choice, and how each signal goes with the score."""
    print(f"{'':16}{'steps':>16}" + "".join(f"{part:>18}" for part in (*PARTS, "score")))
    for name in records[0]["chosen"]:
        steps = [record["chosen"][name] for record in records]
        parts = [record["judged"][str(step)] for record, step in zip(records, steps, strict=True)]
        means = [statistics.fmean(one[part] for one in parts) for part in PARTS]
        score = statistics.fmean(harmonic_mean(one) for one in parts)
        cells = "".join(f"{mean:>18.3f}" for mean in (*means, score))
        print(f"{name:16}{', '.join(map(str, steps)):>16}{cells}")
    print("\nrank correlation over all judged states")
    for signal, value in correlations(records).items():
        print(f"{signal:16}{value:>8.2f}")


def correlations(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return Spearman's rank correlation of each signal with the score, over all judged states.

    A state has the figures of the last reading before it.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        readings = [MeterReading.from_json(one) for one in record["readings"]]
        for step, parts in record["judged"].items():
            before = [one for one in readings if one.step <= int(step)]
            for signal, value in (before[-1].figures() if before else {}).items():
                if signal in SIGNALS:
                    points.setdefault(signal, []).append((value, harmonic_mean(parts)))
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
    if known.steps % EVERY:
        raise UserError(f"--steps must be a multiple of {EVERY}, at which states are kept.")
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
    out.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps(asdict(plan)))
    del settings["seeds"]
    study.keep_settings(out / "stopping.json", settings)
    print_tables(run(plan, out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
