"""Training, measured: whole runs of transfer_learning.py, a peer's script beside them.

On a CPU the embedded model, on CUDA the configuration of Stable Diffusion 2.1 base with random
weights. Every figure is of a real run: there is no second training loop here.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth import tiny
from dreambooth.benchmarks.train_step import ours, peer
from dreambooth.benchmarks.train_step.ours import Figures, Outcome, Scale, Setting, Subject
from dreambooth.benchmarks.train_step.peer import PeerFigures, PeerOutcome
from dreambooth.diffusion.facts import read_facts
from dreambooth.errors import UserError

if TYPE_CHECKING:  # it loads torch
    from dreambooth.benchmarks.train_step.graph_check import GraphCheck
    from dreambooth.benchmarks.train_step.work import Peak

_WARM_UP = 5
_GIB = 2**30
_LEGEND = """\
ms: median of a step, with its tenth and ninth decile. TFLOP/s: U-Net forward and backward as
counted by torch.utils.flop_counter (what gradient checkpointing computes again is not counted).
floor: those FLOPs at the device's peak and the optimizer's bytes at its bandwidth.
fast: with fast_step=True, whose steps are timed ten at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One setting's outcome with what its step costs at the least; peer: the script's outcome."""

    outcome: Outcome
    flops: int
    floor_ms: float
    peer: PeerOutcome | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """All rows; stand_in: the peer ran without the real torchvision; graphs: only on CUDA."""

    rows: tuple[Row, ...]
    peak: Peak
    stand_in: bool
    graphs: GraphCheck | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is measured, for how long, and beside whom."""
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
        "--steps", type=_steps, metavar="N", help="measured per setting; default: 50, quick 3"
    )
    parser.add_argument(
        "--model",
        metavar="M",
        help="folder, tiny or full (2.1 base, random weights); default: full on CUDA, else tiny",
    )


def main(arguments: argparse.Namespace) -> int:
    """Run, print the table and the JSON line; 1 where a run failed. Raises UserError."""
    if arguments.derived:
        return _derive()
    if arguments.peer is not None and not arguments.peer.is_file():
        raise UserError(f"There is no file {arguments.peer}: give --peer a train_dreambooth.py.")
    import torch

    from dreambooth.training import device as devices

    device = devices.from_torch(torch)
    scale = Scale(
        steps=arguments.steps or (3 if arguments.quick else 50),
        warm_up=1 if arguments.quick else _WARM_UP,
        class_images=2 if arguments.quick else 16,
    )
    name = arguments.model or ("full" if device.kind == "cuda" else "tiny")
    with tempfile.TemporaryDirectory(prefix="train-") as place:
        subject = Subject(
            model=_model(name, Path(place)), photos=tiny.DATA / "dog1_8", device=device
        )
        settings = tuple(ours.settings(device, quick=arguments.quick))
        result = measure(subject, settings, scale, Path(place), script=arguments.peer)
    show(result)
    print(json.dumps(summary(result, subject, scale, model=name)), flush=True)
    wrong = result.graphs is not None and result.graphs.fault is not None
    return 1 if wrong or any(_faults(row) for row in result.rows) else 0


def _derive() -> int:
    from dreambooth.benchmarks.train_step import derived

    counts, rows = derived.derive()
    derived.show(counts, rows)
    print(json.dumps(derived.document(counts, rows)), flush=True)
    return 0


def measure(
    subject: Subject,
    settings: Sequence[Setting],
    scale: Scale,
    place: Path,
    *,
    script: Path | None,
) -> Result:
    """Each setting in a folder of its own in `place`, which goes when it is measured.

    script: the peer's, run where the memory plan is what it does by default.
    """
    from dreambooth.benchmarks.train_step import work

    outcomes: list[tuple[Outcome, PeerOutcome | None]] = []
    for number, setting in enumerate(settings):
        _tell(_name(setting))
        folder = place / f"setting{number}"
        outcome, theirs = ours.run(setting, subject, scale, folder), None
        shutil.rmtree(folder / "model", ignore_errors=True)
        if script is not None and setting.memory_plan == "fp32_adamw" and not outcome.fault:
            _tell(f"{_name(setting)}: {script.name}")
            theirs = peer.run(script, outcome, subject, scale, folder / "peer")
        shutil.rmtree(folder)
        outcomes.append((outcome, theirs))
    graphs = None
    if any(setting.fast_step for setting in settings):
        _tell("fast step: replays beside eager calls")
        graphs = _check_graphs(subject)
    peak = work.peak(subject.device)  # measured, if so, when nothing else runs
    parameters = read_facts(subject.model).unet_parameters
    rows = []
    for outcome, theirs in outcomes:
        flops = work.count_flops(subject.model, outcome.setting.pictures)
        plan = outcome.setting.memory_plan
        traffic = parameters * work.optimizer_bytes(plan, subject.mixed_precision)
        floor_ms = 1000 * (flops / peak.flop_per_s + traffic / peak.bytes_per_s)
        rows.append(Row(outcome=outcome, flops=flops, floor_ms=floor_ms, peer=theirs))
    return Result(
        rows=tuple(rows),
        peak=peak,
        stand_in=script is not None and peer.needs_stand_in(),
        graphs=graphs,
    )


def _check_graphs(subject: Subject) -> GraphCheck:
    import torch

    from dreambooth.benchmarks.train_step import graph_check
    from dreambooth.diffusion.cuda_graphs import CudaRecorder

    device = torch.device("cuda", torch.cuda.current_device())
    try:
        return graph_check.check(
            subject.model,
            device,
            mixed_precision=subject.mixed_precision,
            pictures=2 * ours.BATCH_SIZE,
            record=CudaRecorder(device).record,
        )
    except RuntimeError as error:  # what was measured before it is not lost
        return graph_check.GraphCheck(error=str(error))


def summary(result: Result, subject: Subject, scale: Scale, *, model: str) -> dict[str, Any]:
    """The JSON document."""
    import torch

    return {
        "benchmark": "train",
        "model": model,
        "device": subject.device.name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "mixed_precision": subject.mixed_precision,
        "batch_size": ours.BATCH_SIZE,
        "scale": asdict(scale),
        "peak": asdict(result.peak),
        "peer_has_stand_in": result.stand_in,
        "graphs": None if result.graphs is None else asdict(result.graphs),
        "settings": [_plain(row) for row in result.rows],
    }


def _model(name: str, place: Path) -> Path:
    if name == "tiny":
        return tiny.WEIGHTS
    if name == "full":
        from dreambooth.benchmarks.train_step import full_size

        _tell("writing the full-size model")
        full_size.write_model(place / "base")
        return place / "base"
    folder = Path(name).resolve()
    read_facts(folder)
    return folder


def _steps(text: str) -> int:
    steps = int(text)
    if steps < 2:  # one has no spread
        raise argparse.ArgumentTypeError("at least 2 steps are measured")
    return steps


def _tell(doing: str) -> None:
    print(doing, file=sys.stderr, flush=True)


def _name(setting: Setting) -> str:
    loss = "prior" if setting.with_prior_preservation else "plain"
    return f"{loss} {'fast ' * setting.fast_step}{setting.memory_plan}"


def show(result: Result) -> None:
    """Print the table and what its columns mean."""
    peak = result.peak
    print(
        f"{'setting':<32}{'ms':>9}{'p10-p90':>18}{'pictures/s':>12}{'TFLOP/s':>10}{'of floor':>10}"
        f"{'memory GiB':>12}{'first step':>12}{'class image':>13}{'export':>9}{'run':>9}"
    )
    for row in result.rows:
        name, figures = _name(row.outcome.setting), row.outcome.figures
        print(_line(name, row, figures) if figures else f"{name:<32}{row.outcome.fault}")
        if row.peer is not None:
            theirs = row.peer.figures
            print(_peer_line(theirs) if theirs else f"{'  peer':<32}{row.peer.fault}")
            if theirs and figures:
                print(
                    f"{'  ratio':<32}{theirs.times.median_ms / figures.times.median_ms:9.2f}"
                    f"  whole run {theirs.run_s / figures.without_class_images_s:.2f} "
                    "(without sampling class images)"
                )
    print(f"\n{_LEGEND}")
    print(f"peak: {peak.flop_per_s / 1e12:.3g} TFLOP/s, {peak.bytes_per_s / 1e9:.4g} GB/s", end=" ")
    print(f"({peak.source})")
    if result.graphs is not None:
        print(f"fast step: {result.graphs.told}")
    if result.stand_in:
        print("torchvision is missing: the peer ran with a small stand-in for its transforms")


def _line(name: str, row: Row, figures: Figures) -> str:
    sampling = figures.class_image_s
    return (
        f"{name:<32}{_times(figures)}{_pictures_per_s(row, figures):12.2f}"
        f"{_tflop_per_s(row, figures):10.4g}{row.floor_ms / figures.times.median_ms:10.1%}"
        f"{_memory(figures):>12}{figures.first_step_s:10.1f} s"
        f"{'-' if sampling is None else f'{sampling:.2f} s':>13}{figures.export_s:7.2f} s"
        f"{figures.run_s:7.1f} s"
    )


def _peer_line(theirs: PeerFigures) -> str:
    blank = " " * 32  # pictures per second, TFLOP/s and share of the floor: see the ratio
    return (
        f"{'  peer':<32}{_times(theirs)}{blank}{_memory(theirs):>12}{theirs.first_step_s:10.1f} s"
        f"{'':22}{theirs.run_s:7.1f} s"
    )


def _times(figures: Figures | PeerFigures) -> str:
    times = figures.times
    return f"{times.median_ms:9.1f}{f'{times.p10_ms:.1f}-{times.p90_ms:.1f}':>18}"


def _memory(figures: Figures | PeerFigures) -> str:
    """Allocated/reserved on the GPU; on a CPU what the process held."""
    memory = figures.memory
    if memory is None:
        return "-"
    if memory.allocated is None or memory.reserved is None:
        return f"{memory.resident / _GIB:.2f}"
    return f"{memory.allocated / _GIB:.2f}/{memory.reserved / _GIB:.2f}"


def _pictures_per_s(row: Row, figures: Figures) -> float:
    return 1000 * row.outcome.setting.pictures / figures.times.mean_ms


def _tflop_per_s(row: Row, figures: Figures) -> float:
    return row.flops / figures.times.median_ms / 1e9


def _faults(row: Row) -> list[str]:
    both = (row.outcome, row.peer)
    return [each.fault for each in both if each is not None and each.fault is not None]


def _plain(row: Row) -> dict[str, Any]:
    """One row of the JSON document."""
    figures, theirs = row.outcome.figures, row.peer.figures if row.peer else None
    plain: dict[str, Any] = {
        **asdict(row.outcome.setting),
        "flops_per_step": row.flops,
        "floor_ms": row.floor_ms,
        "faults": _faults(row),
    }
    if figures is not None:
        plain |= asdict(figures)
        plain["pictures_per_s"] = _pictures_per_s(row, figures)
        plain["tflop_per_s"] = _tflop_per_s(row, figures)
        plain["share_of_floor"] = row.floor_ms / figures.times.median_ms
    if figures is not None and theirs is not None:
        plain["peer"] = asdict(theirs)
        plain["ratio"] = theirs.times.median_ms / figures.times.median_ms
        plain["ratio_mean"] = theirs.times.mean_ms / figures.times.mean_ms
        plain["ratio_whole_run"] = theirs.run_s / figures.without_class_images_s
    return plain
