"""Measure serving under load: one request at a time, whole requests together, and step by step.

By default the real engine serves Poisson arrivals of mixed steps and guidance at 0.5, 0.8 and 1.3
of what the device can serve one at a time. The engine's own time per step is measured as well, and
whether pictures drawn in traffic equal those drawn alone. `--simulate` counts time instead of
spending it and uses published figures of GPUs. `--full_size` measures U-Net calls and pictures of a
full-size model on a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.serving_load import simulation, traffic
from benchmarks.serving_load.simulation import CardResult
from dreambooth import tiny

if TYPE_CHECKING:  # these load torch, and `--simulate` needs none
    from benchmarks.serving_load.measuring import Loads, LoadScale, Overhead
    from benchmarks.serving_load.redrawing import Agreement

_A_FIFTH = tuple(count // 5 for count in traffic.STEPS)
_SIMULATED_PICTURES = 3000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options: what is measured, and for how long."""
    parser.add_argument("--model", default="tiny", help="model folder; default: tiny")
    parser.add_argument("--seconds", type=float, help="of arrivals per run; default: 60, quick 5")
    parser.add_argument(
        "--steps",
        type=int,
        nargs="+",
        default=_A_FIFTH,
        metavar="N",
        help="of the requests; default: 4 5 6 10, a fifth of the usual 20 25 30 50",
    )
    parser.add_argument("--quick", action="store_true", help="see that it works: a minute or two")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--simulate", action="store_true", help="GPUs, by published figures")
    what.add_argument(
        *("--full_size", "--full-size"),
        action="store_true",
        help="on a GPU: Stable Diffusion 2.1 base, random weights; plain, as CUDA graphs, with "
        "channels last, and beside diffusers' pipeline; else the embedded model, without graphs",
    )
    parser.add_argument("--seed", type=int, default=0, help="of arrivals and requests")


def main(arguments: argparse.Namespace) -> int:
    """Run, print the tables and the JSON line; return the exit code.

    1: an exact picture changed or, with --full_size, CUDA graphs were given up.
    """
    if arguments.simulate:
        pictures = _SIMULATED_PICTURES // (10 if arguments.quick else 1)
        results = [
            simulation.simulate(card, pictures=pictures, seed=arguments.seed)
            for card in simulation.CARDS
        ]
        _show_cards(results)
        _print_json({"benchmark": "serving simulated", "cards": [_plain(each) for each in results]})
        return 0
    if arguments.full_size:
        from benchmarks.serving_load import full_size_run

        return full_size_run.run(arguments.model, quick=arguments.quick)
    return _measure(arguments)


def _measure(arguments: argparse.Namespace) -> int:
    import torch

    from benchmarks.serving_load import measuring

    folder = tiny.WEIGHTS if arguments.model == "tiny" else Path(arguments.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scale = _scale(arguments)

    def say(doing: str) -> None:
        print(doing, file=sys.stderr, flush=True)

    loads = measuring.measure_loads(folder, device, scale, seed=arguments.seed, say=say)
    say("the engine's own time per step")
    overheads = measuring.measure_overhead(folder, device, scale)
    say("pictures drawn alone and again in traffic")
    agreements = measuring.measure_agreement(folder, device, scale, seed=arguments.seed)
    _show(loads, overheads, agreements, scale)
    summary = {
        "benchmark": "serving",
        "model": arguments.model,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seed": arguments.seed,
        "scale": _plain(scale),
        **_plain(loads),
        "overhead": [_plain(each) for each in overheads],
        "redrawn": {mode: _plain(each) for mode, each in agreements.items()},
    }
    _print_json(summary)
    return 1 if agreements["exact"].bytes_differing else 0


def _scale(arguments: argparse.Namespace) -> LoadScale:
    from benchmarks.serving_load.measuring import LoadScale

    quick: bool = arguments.quick
    return LoadScale(
        seconds=arguments.seconds or (5.0 if quick else 60.0),
        steps=tuple(arguments.steps),
        warm_up_budget_s=0.5 if quick else 10.0,
        redrawn=8 if quick else 200,
        batch_rows=4 if quick else 8,
        overhead_steps=40 if quick else 400,
    )


def _show(
    loads: Loads,
    overheads: Sequence[Overhead],
    agreements: dict[str, Agreement],
    scale: LoadScale,
) -> None:
    calls = ", ".join(f"{n}: {1000 * s:.1f}" for n, s in loads.warm_up.seconds_per_call)
    print(f"milliseconds of a U-Net call by rows: {calls}; at most {loads.warm_up.rows} rows")
    print(
        f"steps {scale.steps}, guidance {traffic.GUIDANCE_SCALES}; "
        f"serial capacity {loads.serial_per_s:.3f} pictures per second"
    )
    print(f"\n{traffic.table(loads.figures)}")
    print(f"\n{'rows':>4}{'guided ms':>12}{'unguided ms':>13}  the engine's own time per step")
    for each in overheads:
        guided = "-" if each.guided_ms is None else f"{each.guided_ms:.3f}"
        print(f"{each.rows:>4}{guided:>12}{each.unguided_ms:>13.3f}")
    print(f"\n{'drawn again':<14}{'pictures':>9}{'bytes differing':>17}{'largest, of 255':>17}")
    for mode, found in agreements.items():
        print(
            f"{mode:<14}{found.pictures:>9}{found.bytes_differing:>17}{found.largest_difference:>17}"
        )


def _show_cards(results: Sequence[CardResult]) -> None:
    for each in results:
        card = each.card
        print(
            f"{card.name}: {card.fixed_ms} + {card.picture_ms} ms per guided picture of a call "
            f"({card.source}), decoding {1000 * card.decode_s:.0f} ms; at most {each.rows} rows; "
            f"serial {each.serial_per_s:.3f} pictures per second"
        )
        print(traffic.table(each.figures))
        print(
            f"under more load than that: step-level x {each.gain:.2f}, "
            f"request-level x {each.request_level_gain:.2f}\n"
        )


def _plain(thing: Any) -> dict[str, Any]:
    """Return a dataclass as a dict for JSON, with floats rounded to 4 significant digits."""

    def rounded(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.4g}")
        if isinstance(value, dict):
            return {name: rounded(each) for name, each in value.items()}
        if isinstance(value, (list, tuple)):
            return [rounded(each) for each in value]
        return value

    plain: dict[str, Any] = rounded(asdict(thing))
    return plain


def _print_json(summary: dict[str, Any]) -> None:
    print(json.dumps(summary), flush=True)
