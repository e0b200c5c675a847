"""Measure training: whole runs of transfer_learning.py and, if given, a peer's script beside them.

On a CPU the embedded model is trained, on CUDA the configuration of Stable Diffusion 2.1 base with
random weights. Every figure comes from a real run: there is no second training loop here.
`python -m benchmarks gpu` runs some of this, and much else, in one call of a few minutes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.train_step import levers, ours, peer, table
from benchmarks.train_step.conditions import T4_MEMORY_GIB, Conditions
from benchmarks.train_step.ours import RunOutcome, RunScale, Setting, Subject
from benchmarks.train_step.peer import PeerOutcome
from benchmarks.train_step.result import Row, TrainResult
from dreambooth import tiny
from dreambooth.errors import UserError
from dreambooth.model_folder.facts import read_facts
from dreambooth.settings.hyperparameters import MEMORY_PLANS

if TYPE_CHECKING:  # these load torch
    from benchmarks.train_step.graph_check import GraphCheck
    from dreambooth.training.device import DeviceFacts

_WARM_UP = 5
_JOB = RunScale(steps=395, warm_up=_WARM_UP, class_images=100)  # as in the goal: 400 steps in all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options: what is measured, for how long, and beside which script."""
    parser.add_argument("--quick", action="store_true", help="see that it works: a minute or two")
    parser.add_argument(
        "--peer", type=Path, metavar="FILE", help="diffusers' train_dreambooth.py, to run as well"
    )
    parser.add_argument(
        "--derived",
        action="store_true",
        help="only print what a step should take on a T4 and an A10G, from counts alone",
    )
    parser.add_argument(
        "--levers", action="store_true", help="only print what each lever should gain, and gains"
    )
    parser.add_argument(
        "--scaling",
        action="store_true",
        help="only print the share of communication of 1, 2, 4 and 8 processes",
    )
    parser.add_argument(
        *("--memory_gib", "--memory-gib"),
        type=float,
        metavar="N",
        help="on a GPU: one whole job, in which torch may reserve so much and no more",
    )
    parser.add_argument(
        *("--as_t4", "--as-t4"),
        action="store_true",
        help="the same as a T4: fp16 with loss scaling, without flash and cuDNN attention, "
        f"{T4_MEMORY_GIB:g} GiB where --memory_gib says nothing else",
    )
    parser.add_argument(
        *("--memory_plan", "--memory-plan"), choices=tuple(MEMORY_PLANS), help="only this one"
    )
    parser.add_argument(
        "--steps", type=_steps, metavar="N", help="measured per setting; default: 50, quick 3"
    )
    parser.add_argument(
        "--model",
        metavar="M",
        help="folder, tiny or full (2.1 base, random weights); default: full on CUDA, else tiny",
    )


def main(arguments: argparse.Namespace) -> int:
    """Run, print the table and the JSON line; return 1 if a run failed. Raises UserError."""
    if arguments.derived:
        return _derive()
    if arguments.levers:
        levers.show()
        return 0
    if arguments.scaling:
        return _scale(quick=arguments.quick)
    import torch

    from benchmarks import provenance
    from dreambooth.training import device as devices

    device = devices.from_torch(torch)
    _refuse(arguments, device)
    conditions = Conditions(memory_gib=arguments.memory_gib, as_t4=arguments.as_t4)
    if conditions.as_t4 and conditions.memory_gib is None:
        conditions = replace(conditions, memory_gib=T4_MEMORY_GIB)
    scale = RunScale(
        steps=arguments.steps or (3 if arguments.quick else 50),
        warm_up=1 if arguments.quick else _WARM_UP,
        class_images=2 if arguments.quick else 16,
    )
    own_scale = arguments.quick or arguments.steps or device.kind == "cpu"
    name = arguments.model or ("full" if device.kind == "cuda" else "tiny")
    with tempfile.TemporaryDirectory(prefix="train-") as place:
        subject = Subject(
            model=_model(name, Path(place)),
            photos=tiny.DATA / "dog1_8",
            device=device,
            conditions=conditions,
        )
        settings = tuple(_settings(arguments, subject))
        job_scale = scale if own_scale else _JOB
        result = measure(
            subject, settings, scale, Path(place), script=arguments.peer, job_scale=job_scale
        )
    found = provenance.facts(torch.device(device.kind))
    print(provenance.in_words(found))
    table.show(result)
    document = summary(result, subject, scale, job_scale, model=name, found=found)
    print(json.dumps(document), flush=True)
    return 1 if result.failed else 0


def _scale(*, quick: bool) -> int:
    from benchmarks.train_step import scaling

    counts = scaling.PROCESSES[:2] if quick else scaling.PROCESSES
    rows = [*scaling.count(), *scaling.measure(counts, steps=3 if quick else 20)]
    scaling.show(rows)
    print(json.dumps(scaling.document(rows)), flush=True)
    return 0


def _refuse(arguments: argparse.Namespace, device: DeviceFacts) -> None:
    """Raise UserError for options that cannot be measured here."""
    script: Path | None = arguments.peer
    if script is not None and not script.is_file():
        raise UserError(f"There is no file {script}: give --peer a train_dreambooth.py.")
    held = {"--as_t4": arguments.as_t4, "--memory_gib": arguments.memory_gib is not None}
    if script is not None and any(held.values()):
        raise UserError(
            "--peer is timed on the GPU as it is: leave out --memory_gib and --as_t4, or --peer."
        )
    if device.kind == "cpu":
        for option, given in held.items():
            if given:
                raise UserError(f"{option} is for a run on a CUDA GPU, and torch sees none here.")
    if arguments.memory_gib is not None and arguments.memory_gib <= 0:
        raise UserError("--memory_gib must be above 0.")


def _settings(arguments: argparse.Namespace, subject: Subject) -> Iterator[Setting]:
    """Yield the device's settings and a whole job; under conditions the whole job alone."""
    plan: str | None = arguments.memory_plan
    if subject.conditions == Conditions():
        yield from ours.settings(subject.device, quick=arguments.quick, only=plan)
    yield Setting(with_prior_preservation=True, memory_plan=plan or "auto", whole_job=True)


def _derive() -> int:
    from benchmarks.train_step import derived

    rows = derived.derive()
    derived.show(rows)
    print(json.dumps(derived.document(rows)), flush=True)
    return 0


def measure(
    subject: Subject,
    settings: Sequence[Setting],
    scale: RunScale,
    place: Path,
    *,
    script: Path | None,
    job_scale: RunScale | None = None,
) -> TrainResult:
    """Measure each setting in a folder of its own in `place`, which is removed afterwards.

    script: the peer's script, run where the memory plan is fp32_adamw, its default, but not for
    whole jobs. job_scale: the scale of whole jobs, where it differs.
    """
    from benchmarks.train_step import work

    outcomes: list[tuple[RunOutcome, PeerOutcome | None]] = []
    for number, setting in enumerate(settings):
        _tell(table.name(setting))
        folder = place / f"setting{number}"
        long = job_scale if setting.whole_job else None
        outcome, theirs = ours.run(setting, subject, long or scale, folder), None
        shutil.rmtree(folder / "model", ignore_errors=True)
        as_theirs = setting.memory_plan == "fp32_adamw" and not setting.whole_job
        if script is not None and as_theirs and not outcome.fault:
            _tell(f"{table.name(setting)}: {script.name}")
            theirs = peer.run(script, outcome, subject, scale, folder / "peer")
        shutil.rmtree(folder)
        outcomes.append((outcome, theirs))
    graphs = None
    if any(setting.fast_step for setting in settings):
        _tell("fast step: replays beside eager calls")
        graphs = _check_graphs(subject)
    peak = work.peak(subject.device)  # if it is measured, nothing else must run
    parameters = read_facts(subject.model).unet_parameters
    rows = []
    for outcome, theirs in outcomes:
        flops = work.count_flops(subject.model, outcome.setting.pictures)
        traffic = parameters * work.optimizer_bytes(_plan(outcome), subject.mixed_precision)
        floor_ms = 1000 * (flops / peak.flop_per_s + traffic / peak.bytes_per_s)
        rows.append(Row(outcome=outcome, flops=flops, floor_ms=floor_ms, peer=theirs))
    return TrainResult(
        rows=tuple(rows),
        peak=peak,
        stand_in=script is not None and peer.needs_stand_in(),
        graphs=graphs,
    )


def _plan(outcome: RunOutcome) -> str:
    """Return the memory plan that a job took, or the one that it would have tried first."""
    taken = outcome.figures.memory_plan if outcome.figures else outcome.setting.memory_plan
    return taken if taken in MEMORY_PLANS else next(iter(MEMORY_PLANS))


def _check_graphs(subject: Subject) -> GraphCheck:
    import torch

    from benchmarks.train_step import graph_check
    from dreambooth.fast.cuda_graphs import CudaGraphCapturer

    device = torch.device("cuda", torch.cuda.current_device())
    try:
        return graph_check.check(
            subject.model,
            device,
            mixed_precision=subject.mixed_precision,
            pictures=2 * ours.BATCH_SIZE,
            capture=CudaGraphCapturer(device).capture,
        )
    except RuntimeError as error:  # keep what was measured before it
        return graph_check.GraphCheck(error=str(error))


def summary(
    result: TrainResult,
    subject: Subject,
    scale: RunScale,
    job_scale: RunScale,
    *,
    model: str,
    found: dict[str, Any],
) -> dict[str, Any]:
    """Return the JSON document; found: the result of `provenance.facts`."""
    return {
        "benchmark": "train",
        "model": model,
        **found,
        "mixed_precision": subject.mixed_precision,
        "conditions": asdict(subject.conditions),
        "batch_size": ours.BATCH_SIZE,
        "scale": asdict(scale),
        "job_scale": asdict(job_scale),
        "peak": asdict(result.peak),
        "peer_has_stand_in": result.stand_in,
        "graphs": None if result.graphs is None else asdict(result.graphs),
        "settings": [row.document() for row in result.rows],
    }


def _model(name: str, place: Path) -> Path:
    if name == "tiny":
        return tiny.WEIGHTS
    if name == "full":
        from benchmarks.train_step import full_size

        _tell("writing the full-size model")
        full_size.write_model(place / "base")
        return place / "base"
    folder = Path(name).resolve()
    read_facts(folder)
    return folder


def _steps(text: str) -> int:
    steps = int(text)
    if steps < 2:  # one step has no spread
        raise argparse.ArgumentTypeError("at least 2 steps are measured")
    return steps


def _tell(doing: str) -> None:
    print(doing, file=sys.stderr, flush=True)
