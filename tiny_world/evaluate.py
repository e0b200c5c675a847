"""Let the judge read what a model of the drawn world draws: `python -m tiny_world evaluate`.

A base model is asked for every word of the world. A model that was fine-tuned on one of the shipped
subjects is asked for what it should have learned of the subject and what it should have kept. Heavy
imports wait until the command runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth import tiny
from dreambooth.errors import UserError
from dreambooth.process import addresses, logs
from dreambooth.settings.command_line import Parser

if TYPE_CHECKING:
    from dreambooth.model_folder.source import ModelSource
    from tiny_world.answers import Answers, Share
    from tiny_world.asking import Interview, Settings
    from tiny_world.questions import Goal, Questions

PRECISIONS = ("fp32", "bf16")
BATCH_SIZE = 16
"""Pictures per call; larger batches are no faster on a CPU."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = Parser(prog="python -m tiny_world evaluate", description=__doc__)

    def option(name: str, **how: Any) -> None:
        made.add_argument(f"--{name}", **how)

    scale, steps = tiny.DEFAULTS["guidance_scale"], tiny.DEFAULTS["num_inference_steps"]
    option("model", default="tiny", help="model folder or tarball; default: the embedded model")
    option("base", help="model to compare with, on the same noise; `tiny`: the embedded model")
    option("subject", help="a shipped subject, or `none`; default: what the model was tuned on")
    option("pictures", type=count, default=256, help="pictures of each prompt; default: 256")
    option("guidance_scale", type=float, default=float(scale), help=f"default: {scale}")
    option("num_inference_steps", type=count, default=int(steps), help=f"default: {steps}")
    option("seed", type=int, default=0, help="picture i of every prompt has seed + i; default: 0")
    option("batch_size", type=count, default=BATCH_SIZE, help=f"default: {BATCH_SIZE}")
    option(
        "precision", choices=PRECISIONS, default="fp32", help="bf16 is faster where the CPU has it"
    )
    option("out", default="out/evaluate", help="sheets; default: out/evaluate")
    option("disagreements", action="store_true", help="a sheet of what was not read as asked, too")
    option("record", action="store_true", help="add the figures to the model's recipe.json")
    option("json_only", action="store_true", help="print nothing but the JSON line, draw no sheet")
    return made


def main(argv: Sequence[str]) -> int:
    """Question the model, print the table and write the sheets; the last line is one JSON object.

    Raises DreamBoothError, with a message of one sentence, for wrong options and models.
    """
    from dreambooth.model_folder import source
    from tiny_world import asking, packaging

    arguments = parser().parse_args(argv)
    logs.to_stderr("warning")
    arguments.out = addresses.to_path(arguments.out, "--out")
    with tempfile.TemporaryDirectory(prefix="dreambooth-") as workspace:
        found = source.locate(arguments.model, given="with --model")
        folder = source.open_source(found, Path(workspace))
        other = (
            None if arguments.base is None else source.locate(arguments.base, given="with --base")
        )
        _check_outputs(arguments, found)
        questions, subject = _choose(arguments.subject, folder)
        settings = asking.Settings(
            pictures=arguments.pictures,
            guidance_scale=arguments.guidance_scale,
            num_inference_steps=arguments.num_inference_steps,
            seed=arguments.seed,
            batch_size=arguments.batch_size,
            precision=arguments.precision,
        )
        interview = asking.ask(folder, questions, settings, label="asking the model")
        if arguments.record:
            packaging.add_to_report(folder, {"judged": as_record(interview, settings)})
        base = None
        if other is not None:
            folder = source.open_source(other, Path(workspace))
            base = asking.ask(folder, questions, settings, label="asking the base model")
    result = {
        "model": str(arguments.model),
        "subject": subject,
        **as_record(interview, settings),
        "base": None if base is None else as_record(base, settings),
        "variety_of_base": _variety_ratio(interview, base),
    }
    if not arguments.json_only:
        print_table(interview.answers, questions, None if base is None else base.answers)
        speed = interview.drawn / interview.seconds
        print(f"{interview.drawn} pictures in {interview.seconds:.0f} s, {speed:.2f} pictures/s")
        _write_sheets(interview, arguments)
    print(json.dumps(result), flush=True)
    return 0


def as_record(interview: Interview, settings: Settings) -> dict[str, Any]:
    """Return an interview for JSON: settings, shares by measure and by question, variety."""
    goals = interview.questions.goals
    return {
        **dataclasses.asdict(settings),
        "seconds": round(interview.seconds, 1),
        "pictures_per_second": round(interview.drawn / interview.seconds, 3),
        "measures": {
            measure: {**_share(share), **_goal(goals.get(measure), share)}
            for measure, share in interview.answers.by_measure().items()
        },
        "variety": {
            "prompt": interview.questions.variety_prompt,
            "bits": _rounded(interview.answers.variety_bits),
        },
        "questions": [
            {
                "prompt": question.prompt,
                "measure": question.measure,
                "asked": question.asked,
                **_share(share),
            }
            for question, share in interview.answers.shares
        ],
    }


def print_table(answers: Answers, questions: Questions, base: Answers | None) -> None:
    """Print each question with its share, interval and the base's share, then each measure."""
    others = dict(base.shares) if base is not None else {}
    print(f"{'question':58} {'asked':34} share  95 % interval{'   base' if others else ''}")
    for question, share in answers.shares:
        line = f"{question.prompt:58} {question.asked:34} {_text(share)}"
        print(line + (f"  {others[question].value:.3f}" if others else ""))
    pooled = {} if base is None else base.by_measure()
    print(f"\n{'measure':58} {'goal':34} share  95 % interval{'   base' if others else ''}")
    for measure, share in answers.by_measure().items():
        goal = questions.goals.get(measure)
        met = "" if goal is None else f"{goal} {'met' if goal.is_met(share.value) else 'MISSED'}"
        line = f"{measure:58} {met:34} {_text(share)}"
        print(line + (f"  {pooled[measure].value:.3f}" if pooled else ""))
    if answers.variety_bits is not None:
        print(f"\ncolours of {questions.variety_prompt!r}: {answers.variety_bits:.2f} bits", end="")
        if base is not None and base.variety_bits:
            ratio = answers.variety_bits / base.variety_bits
            print(f", {ratio:.2f} of the base's {base.variety_bits:.2f}", end="")
        print()


def _choose(subject: str | None, folder: Path) -> tuple[Questions, str | None]:
    """Return the questions and the subject that they are about, None for the whole world."""
    from dreambooth.model_folder import layout
    from tiny_world import questions, world

    if subject is None:
        path = folder / layout.MODEL_INFO
        info = layout.read_json(path) if path.is_file() else {}
        subject = questions.subject_of(str(info.get("instance_prompt", "")))
    elif subject == "none":
        subject = None
    elif subject not in world.SUBJECTS:
        raise UserError(
            f"--subject must be one of {', '.join(world.SUBJECTS)}, none; not {subject}."
        )
    if subject is None:
        return questions.of_the_world(), None
    return questions.of_subject(subject), subject


def _check_outputs(arguments: argparse.Namespace, found: ModelSource) -> None:
    """Raise UserError now for outputs that cannot be written after hours of drawing."""
    from tiny_world import packaging

    recipe = Path(str(found.path)) / packaging.RECIPE_FILE
    if arguments.record and not (found.kind == "folder" and recipe.is_file()):
        raise UserError(
            f"--record adds figures to a model folder's {packaging.RECIPE_FILE}, and "
            f"{found.location} has none."
        )
    if not arguments.json_only:
        try:
            arguments.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {arguments.out} cannot be made: {error.strerror}.") from error


def _write_sheets(interview: Interview, arguments: argparse.Namespace) -> None:
    from tiny_world import sheets

    out: Path = arguments.out
    title = (
        f"{arguments.model}: guidance {arguments.guidance_scale:g}, "
        f"{arguments.num_inference_steps} steps"
    )
    try:
        sheets.overview(interview, title).save(out / "sheet.png")
        print(out / "sheet.png")
        if arguments.disagreements:
            sheets.disagreements(interview, title).save(out / "disagreements.png")
            print(out / "disagreements.png")
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror or error}.") from error


def _variety_ratio(interview: Interview, base: Interview | None) -> float | None:
    own = interview.answers.variety_bits
    if own is None or base is None or not base.answers.variety_bits:
        return None
    return _rounded(own / base.answers.variety_bits)


def _share(share: Share) -> dict[str, Any]:
    low, high = share.interval
    return {
        "right": share.right,
        "of": share.of,
        **{"share": _rounded(share.value), "low": _rounded(low), "high": _rounded(high)},
    }


def _goal(goal: Goal | None, share: Share) -> dict[str, Any]:
    return {} if goal is None else {"goal": str(goal), "met": goal.is_met(share.value)}


def _text(share: Share) -> str:
    low, high = share.interval
    return f"{share.value:.3f}  {low:.3f}..{high:.3f}"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def count(text: str) -> int:
    """Return a whole number of at least 1, as an option gives it."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value
