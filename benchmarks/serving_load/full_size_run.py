"""Measure full-size U-Net calls and pictures: `python -m benchmarks serving --full_size`.

On CUDA the model has the configuration of Stable Diffusion 2.1 base and random weights, in half
precision at 512 x 512. Without a GPU the same code runs on the embedded model, without graphs.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import provenance
from benchmarks.serving_load import full_size_pictures
from benchmarks.serving_load.full_size_calls import ROWS, WAYS
from benchmarks.serving_load.full_size_pictures import AT_ONCE, Effort, FullSize, WayFigures
from dreambooth import tiny

_FULL = Effort(
    calls=20, steps=20, alone=5, burst=40, redrawn=40, batch_rows=8, warm_up_budget_s=10.0
)
_QUICK = Effort(calls=2, steps=2, alone=2, burst=8, redrawn=4, batch_rows=4, warm_up_budget_s=0.5)
_GIB = 2**30


def run(model: str, *, quick: bool) -> int:
    """Measure, print the tables and the JSON line; return the exit code.

    1: an exact picture changed, or CUDA graphs were given up. model: a folder, or `tiny` for the
    device's default model.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    effort = _QUICK if quick else _FULL
    with tempfile.TemporaryDirectory(prefix="serving-") as place:
        folder, name = Path(model), model
        if model == "tiny":
            folder, name = tiny.WEIGHTS, "tiny"
            if device.type == "cuda":
                folder, name = _written(Path(place)), "2.1 base, random weights"
        found = full_size_pictures.measure(folder, device, effort, say=_say)
    machine = provenance.facts(device)
    show(found, effort, machine)
    summary = {
        "benchmark": "serving full size",
        "model": name,
        **machine,
        "effort": asdict(effort),
        **asdict(found),
    }
    print(json.dumps(summary), flush=True)
    changed = any(each.exact.bytes_differing for each in found.ways)
    return 1 if changed or any(_given_up(each) for each in found.ways) else 0


def show(found: FullSize, effort: Effort, machine: Mapping[str, object]) -> None:
    """Print the tables; the cells of a way that was not measured say why."""
    ways = {each.way: each for each in found.ways}
    print(f"{provenance.in_words(machine)}; {found.dtype}, {found.pixels} x {found.pixels} pixels")
    print(f"\nmilliseconds of a U-Net call\n{'rows':>4}{_cells([way.name for way in WAYS])}")
    for place, rows in enumerate(ROWS):
        cells = [_call_cell(ways.get(way.name), place) for way in WAYS]
        print(f"{rows:>4}{_cells(cells)}")
    print("in brackets: the largest difference of an output from the eager way's, 0: same bits")
    print(
        f"\n{f'pictures of {effort.steps} steps':<22}{'one, s':>9}{'x diffusers':>13}{'alone/s':>9}"
        f"{f'{AT_ONCE} at once/s':>14}{'gain':>6}{'rows':>6}{'exact: bytes changed':>22}"
        f"{'graphs':>8}{'GiB':>18}"
    )
    print(f"{'diffusers, eager':<22}{found.peer_picture_s:>9.3f}{1:>13.2f}")
    for way in WAYS:
        figures = ways.get(way.name)
        print(f"{way.name:<22}{_picture_cells(figures, found.peer_picture_s)}")
    if any(each.peak for each in found.ways):
        print("GiB: the most that torch allocated and reserved, and the GPU's in use at the end")


def _call_cell(figures: WayFigures | None, place: int) -> str:
    if figures is None:
        return "not on a CPU"
    call = figures.calls[place]
    return f"{call.ms:.2f} ({call.largest_difference:.2g})"


def _cells(texts: Sequence[str]) -> str:
    return "".join(f"{text:>24}" for text in texts)


def _picture_cells(figures: WayFigures | None, peer_picture_s: float) -> str:
    if figures is None:
        return f"{'not on a CPU':>15}"
    memory, peak = "-", figures.peak
    if peak is not None:
        sizes = (peak.allocated, peak.reserved, peak.in_use)
        memory = "/".join(f"{size / _GIB:.2f}" for size in sizes)
    exact = f"{figures.exact.bytes_differing} in {figures.exact.pictures}"
    return (
        f"{figures.picture_s:>9.3f}{peer_picture_s / figures.picture_s:>13.2f}"
        f"{figures.alone_per_s:>9.2f}{figures.burst_per_s:>14.2f}"
        f"{figures.burst_per_s / figures.alone_per_s:>6.2f}{figures.rows:>6}{exact:>22}"
        f"{'given up' if _given_up(figures) else figures.graphs:>8}{memory:>18}"
    )


def _given_up(figures: WayFigures) -> bool:
    """Return whether a way with CUDA graphs ended without any."""
    wanted = {way.name for way in WAYS if way.cuda_graphs}
    return figures.way in wanted and not figures.graphs


def _written(folder: Path) -> Path:
    from benchmarks.train_step import full_size

    _say("writing the model: 5.2 GB")
    full_size.write_model(folder)
    return folder


def _say(doing: str) -> None:
    print(doing, file=sys.stderr, flush=True)
