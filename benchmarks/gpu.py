"""Measure in one call of a few minutes everything that only a GPU can show.

Stages run in order, the most valuable fact first, each in a process with a time limit of its own.
Every fact is a line of DIR/facts.jsonl as soon as it is found. At the end, also when stages were
cut off, DIR/table.md holds the tables and verdicts and DIR/record.json all of it; `show` writes
both anew from the facts, on any machine. `pack` writes what a machine without a network lacks.
Nothing has run on a GPU yet (2026-11-30): what is tested is a dry run on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.gpu_stages import pack, report
from benchmarks.gpu_stages.facts import FILE_NAME, FactFile, read
from benchmarks.gpu_stages.found import Found
from benchmarks.gpu_stages.running import StageContext, run_all
from benchmarks.gpu_stages.stages import NAMES, STAGES
from benchmarks.gpu_stages.verdicts import lever_verdicts, verdicts
from dreambooth import tiny
from dreambooth.errors import UserError
from dreambooth.model_folder.facts import read_facts
from dreambooth.training import device as devices

BUDGET_S = 540.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options: what is done, where its files are, and for how long."""
    parser.add_argument(
        "what", nargs="?", choices=("run", "show", "pack"), default="run", help="default: run"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="of its files")
    parser.add_argument(
        "--budget",
        type=float,
        default=BUDGET_S,
        metavar="SECONDS",
        help=f"of all stages together; default: {BUDGET_S:g}",
    )
    parser.add_argument(
        "--only", metavar="STAGES", help=f"of these, with commas between: {', '.join(NAMES)}"
    )
    parser.add_argument("--dry", action="store_true", help="every stage in miniature, on a CPU")
    parser.add_argument(
        "--peer", type=Path, metavar="FILE", help="diffusers' train_dreambooth.py, to run as well"
    )
    parser.add_argument(
        "--packages", type=Path, metavar="FILE", help="what `pack` wrote: packages for the stages"
    )
    parser.add_argument(
        "--model",
        metavar="M",
        help="folder, tiny or full (2.1 base, random weights); default: full, with --dry tiny",
    )
    parser.add_argument(
        "--python", default="3.12", metavar="V", help="pack: of the other machine; default: 3.12"
    )
    parser.add_argument(
        "--cuda", default="13.0", metavar="V", help="pack: of its torch; default: 13.0"
    )


def main(arguments: argparse.Namespace) -> int:
    """Run the stages, or show or pack; return 1 if a stage failed. Raises UserError.

    A stage that the budget had no time for is no failure; the table names it.
    """
    out: Path = arguments.out.resolve()
    if arguments.what == "pack":
        print(pack.write(out, python=arguments.python, cuda=arguments.cuda))
        return 0
    if arguments.what == "show":
        if not (out / FILE_NAME).exists():
            raise UserError(f"There is no {out / FILE_NAME}: give --out the folder of a run.")
        return _show(out)
    try:
        _run(arguments, out)
    except KeyboardInterrupt:
        _show(out)
        raise
    return _show(out)


def _run(arguments: argparse.Namespace, out: Path) -> None:
    only = _names(arguments.only)
    peer = _file(arguments.peer, "--peer", "a train_dreambooth.py")
    packages = _file(arguments.packages, "--packages", "what `gpu pack` wrote")
    device = devices.in_common(devices.visible_gpus(os.environ)[:1])
    if device.kind == "cpu" and not arguments.dry:
        raise UserError(
            "nvidia-smi shows no GPU here: --dry runs every stage in miniature on a CPU."
        )
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-") as place:
        work = Path(place)
        name = arguments.model or ("tiny" if arguments.dry else "full")
        model = {"tiny": tiny.WEIGHTS, "full": work / "base"}.get(name) or Path(name).resolve()
        if name != "full":
            read_facts(model)
        stages = [stage for stage in STAGES if stage.name in only]
        writes_model = name == "full" and any(stage.needs_model for stage in stages)
        stages = [
            stage
            for stage in STAGES
            if (stage in stages if stage.name != "model" else writes_model)
        ]
        if arguments.dry:  # a busy CPU may take its time
            stages = [replace(stage, limit_s=10 * stage.limit_s) for stage in stages]
        FactFile(out, "run").add(
            *("call", "gpu"),
            budget_s=arguments.budget,
            dry=arguments.dry,
            device=device.name,
            compute_capability=device.compute_capability,
        )
        run_all(
            stages,
            StageContext(out=out, work=work, model=model, peer=peer, dry=arguments.dry),
            budget_s=arguments.budget,
            packages=None if packages is None else pack.unpack(packages, work / "packages"),
        )


def _names(given: str | None) -> Sequence[str]:
    names = NAMES if given is None else given.split(",")
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise UserError(f"--only knows no stage {unknown[0]}: there are {', '.join(NAMES)}.")
    return names


def _file(path: Path | None, option: str, what: str) -> Path | None:
    if path is not None and not path.is_file():
        raise UserError(f"There is no file {path}: give {option} {what}.")
    return None if path is None else path.resolve()


def _show(out: Path) -> int:
    """Write and print the table, and the JSON line; return the exit code."""
    found = Found(read(out))
    print(report.write(out, found))
    judged = [*verdicts(found)]
    words = {"met": True, "missed": False, "not measured": None}
    summary = {
        "benchmark": "gpu",
        "dry": found.dry,
        "device": found.machine.get("device"),
        "record": str(out / report.RECORD_NAME),
        "goals": {word: sum(each.met is met for each in judged) for word, met in words.items()},
        "defaults": [each.lever for each in lever_verdicts(found) if each.becomes_default],
        "incomplete": [*found.incomplete()],
    }
    print(json.dumps(summary), flush=True)
    return 1 if found.failed else 0
