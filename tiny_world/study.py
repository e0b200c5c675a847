"""Compare DreamBooth with and without prior preservation on the embedded model, over several seeds.

The conditions are: no prior preservation, class images, and the base model's own prediction in
place of class images. `python -m tiny_world study --out DIR` fine-tunes through the real job, asks
each result (and the base model) about the subject, and prints the means. Finished fine-tunes and
interviews are kept in DIR, so a stopped command can be started again and continues, and commands
for other seeds, samplings or priors may share one DIR, even at the same time. Options that this
command does not have, such as `--num_class_images 200`, are passed to the training job.
"""

from __future__ import annotations

import functools
import json
import math
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dreambooth import tiny
from dreambooth.errors import DreamBoothError, UserError
from dreambooth.job.run import run_job
from dreambooth.process import logs
from dreambooth.settings.command_line import Parser
from tiny_world import asking, evaluate, questions, sheets
from tiny_world.clean import Critic
from tiny_world.data_sets import DATA_SETS

SAMPLINGS = {"3.5": (3.5, 25), "7.5": (7.5, 50)}
"""(guidance_scale, num_inference_steps): the embedded model's own, and the served defaults."""
CONDITIONS = {
    "prior_off": ("--with_prior_preservation", "False"),
    "prior_on": ("--with_prior_preservation", "True"),
    "prior_prediction": (
        *("--with_prior_preservation", "True"),
        *("--prior_preservation_mode", "prediction"),
    ),
}
"""The options of the training jobs of each condition."""
_CHOICES = {
    "off": ("prior_off",),
    "on": ("prior_on",),
    "prediction": ("prior_prediction",),
    "both": ("prior_off", "prior_on"),
    "all": tuple(CONDITIONS),
}
_MAY_DIFFER = ("seeds", "prior", "samplings")  # between commands that share one folder
# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond these the normal
# distribution's quantile is used.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The settings of a study.

    prior: names of CONDITIONS. job: further options of every training job.
    """

    model: str
    data: str
    seeds: int
    steps: int
    learning_rate: float
    prior: tuple[str, ...]
    pictures: int
    samplings: tuple[tuple[float, int], ...]
    batch_size: int
    precision: str
    job: tuple[str, ...] = ()

    @property
    def subject(self) -> str:
        """Return the subject of the data set."""
        return next(data_set.subject for data_set in DATA_SETS if data_set.folder == self.data)


class Study:
    """Makes the fine-tunes and interviews of a study and keeps them in the folder `out`."""

    def __init__(self, plan: Plan, out: Path) -> None:
        self._plan, self._out = plan, out
        out.mkdir(parents=True, exist_ok=True)
        shared = {key: value for key, value in asdict(plan).items() if key not in _MAY_DIFFER}
        settings = json.loads(json.dumps(shared))
        keep_settings(out / "study.json", settings)

    def run(self) -> dict[str, Any]:
        """Do what is not done yet; return the results, which are also written to results.json."""
        plan = self._plan
        runs = [(prior, seed) for prior in plan.prior for seed in range(plan.seeds)]
        records: dict[str, list[dict[str, Any]]] = {"base": []}
        for sampling in plan.samplings:
            records["base"].append(self._interview("base", self._base(), sampling))
        for prior, seed in runs:
            folder = self._fine_tune(prior, seed)
            for sampling in plan.samplings:
                record = self._interview(f"{prior}-{seed}", folder, sampling)
                records.setdefault(prior, []).append(record)
        results = {
            "settings": asdict(plan),
            "summary": [summarise(records, sampling) for sampling in plan.samplings],
            "records": records,
        }
        _write_json(self._out / "results.json", results)
        return results

    @functools.cached_property
    def _critic(self) -> Critic:
        return Critic.of_the_world()

    def _base(self) -> Path:
        return tiny.WEIGHTS if self._plan.model == "tiny" else Path(self._plan.model)

    def _fine_tune(self, prior: str, seed: int) -> Path:
        """Return the model folder of one fine-tune, which is made unless it is there."""
        plan = self._plan
        folder = self._out / f"{prior}-{seed}"
        if (folder / "model" / "model_index.json").exists():
            return folder / "model"
        code = run_job(
            [
                *("--pretrained-model", plan.model, "--train", str(tiny.DATA / plan.data)),
                *("--model_dir", str(folder / "model")),
                *("--output_data_dir", str(folder / "output")),
                *("--max_steps", str(plan.steps), "--learning_rate", str(plan.learning_rate)),
                *(*CONDITIONS[prior], "--seed", str(seed), "--meter_pictures_share", "0"),
                *plan.job,
            ],
            os.environ,
        )
        if code != 0:
            raise UserError(f"The fine-tune in {folder} ended with exit code {code}; see above.")
        return folder / "model"

    def _interview(self, name: str, folder: Path, sampling: tuple[float, int]) -> dict[str, Any]:
        """Return the record of the model's interview, from disk if it took place before."""
        scale, steps = sampling
        path = self._out / "interviews" / f"{name}_guidance_{scale:g}_steps_{steps}.json"
        if path.exists():
            kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if "clean" in kept:  # older ones are held again
                return kept
        settings = asking.Settings(
            pictures=self._plan.pictures,
            guidance_scale=scale,
            num_inference_steps=steps,
            seed=0,
            batch_size=self._plan.batch_size,
            precision=self._plan.precision,
        )
        asked = questions.of_subject(self._plan.subject)
        interview = asking.ask(folder, asked, settings, label=f"asking {name}")
        record = evaluate.as_record(interview, settings)
        record["clean"] = {
            prompt: self._critic.clean_share(pictures)
            for prompt, pictures in interview.pictures.items()
            if "sketch" not in prompt.split()
        }
        path.parent.mkdir(exist_ok=True)
        title = f"{name}: guidance {scale:g}, {steps} steps"
        sheets.overview(interview, title).save(path.with_suffix(".png"))
        _write_json(path, record)
        return record


def summarise(
    records: dict[str, list[dict[str, Any]]], sampling: tuple[float, int]
) -> dict[str, Any]:
    """Return the mean over the seeds and its 95 % interval, by measure and condition.

    "clean: PROMPT" is the share of its pictures that are clean (`tiny_world.clean`); "variety" the
    entropy of the class's colours as a share of the base model's.
    """
    chosen = {
        condition: [
            record
            for record in rows
            if (record["guidance_scale"], record["num_inference_steps"]) == sampling
        ]
        for condition, rows in records.items()
    }
    base = chosen["base"][0]
    measures = {
        measure: {
            condition: over_seeds([record["measures"][measure]["share"] for record in rows])
            for condition, rows in chosen.items()
        }
        for measure in base["measures"]
    }
    for prompt in base["clean"]:
        measures[f"clean: {prompt}"] = {
            condition: over_seeds([record["clean"][prompt] for record in rows])
            for condition, rows in chosen.items()
        }
    if bits := base["variety"]["bits"]:
        measures["variety"] = {
            condition: over_seeds([record["variety"]["bits"] / bits for record in rows])
            for condition, rows in chosen.items()
        }
    scale, steps = sampling
    return {"guidance_scale": scale, "num_inference_steps": steps, "measures": measures}


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean and the 95 % interval of Student's t over seeds (None for a single seed)."""
    mean, count = statistics.fmean(values), len(values)
    rounded = [round(value, 4) for value in values]
    if count < 2:
        return {"mean": round(mean, 4), "low": None, "high": None, "values": rounded}
    t = _T[count - 2] if count - 2 < len(_T) else statistics.NormalDist().inv_cdf(0.975)
    half = t * statistics.stdev(values) / math.sqrt(count)
    return {
        "mean": round(mean, 4),
        "low": round(mean - half, 4),
        "high": round(mean + half, 4),
        "values": rounded,
    }


def print_tables(results: dict[str, Any]) -> None:
    """Print one table for each sampling, with measures as rows and conditions as columns."""
    for summary in results["summary"]:
        conditions = list(next(iter(summary["measures"].values())))
        scale, steps = summary["guidance_scale"], summary["num_inference_steps"]
        print(f"\nguidance {scale:g}, {steps} steps; mean over seeds and its 95 % interval")
        print(f"{'measure':58}" + "".join(f"{condition:>26}" for condition in conditions))
        for measure, row in summary["measures"].items():
            print(f"{measure:58}" + "".join(f"{_text(row[name]):>26}" for name in conditions))


def _text(cell: dict[str, Any]) -> str:
    if cell["low"] is None:
        return f"{cell['mean']:.3f}"
    return f"{cell['mean']:.3f} ({cell['low']:.3f}..{cell['high']:.3f})"


def keep_settings(path: Path, settings: object) -> None:
    """Write the settings of what a folder holds; raise UserError where it holds other ones."""
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != settings:
        raise UserError(f"{path.parent} holds a study with other settings; give another --out.")
    _write_json(path, settings)


def _write_json(path: Path, content: object) -> None:
    partial = path.with_suffix(f".partial-{os.getpid()}")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def read_plan(argv: Sequence[str] | None) -> tuple[Plan, Path, int]:
    """Return the settings of the study, its output folder and the number of threads."""
    parser = Parser(prog="python -m tiny_world study", description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where results are kept")
    parser.add_argument("--model", default="tiny", help="model folder; default: the embedded one")
    parser.add_argument("--data", default="cat", choices=[each.folder for each in DATA_SETS])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=int(tiny.DEFAULTS["max_steps"]))
    rate = float(tiny.DEFAULTS["learning_rate"])
    parser.add_argument("--learning_rate", type=float, default=rate)
    parser.add_argument("--prior", choices=_CHOICES, default="off")
    parser.add_argument("--pictures", type=int, default=256, help="of each prompt")
    parser.add_argument("--guidance", choices=(*SAMPLINGS, "both"), default="both")
    parser.add_argument("--batch_size", type=int, default=evaluate.BATCH_SIZE)
    parser.add_argument("--precision", choices=evaluate.PRECISIONS, default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    known, rest = parser.parse_known_args(argv)
    plan = Plan(
        model=known.model,
        data=known.data,
        seeds=known.seeds,
        steps=known.steps,
        learning_rate=known.learning_rate,
        prior=_CHOICES[known.prior],
        pictures=known.pictures,
        samplings=tuple(
            sampling for name, sampling in SAMPLINGS.items() if known.guidance in (name, "both")
        ),
        batch_size=known.batch_size,
        precision=known.precision,
        job=tuple(rest),
    )
    return plan, known.out, known.threads


def main(argv: Sequence[str] | None = None) -> int:
    """Fine-tune over several seeds and print what the models learned and forgot."""
    plan, out, threads = read_plan(argv)
    logs.to_stderr("warning")
    torch.set_num_threads(threads)
    try:
        results = Study(plan, out).run()
    except DreamBoothError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print_tables(results)
    print(out / "results.json")
    return 0
