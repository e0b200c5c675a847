"""Print the table of `python -m benchmarks train`, and a table of phases for each whole job."""

from __future__ import annotations

from benchmarks.train_step.conditions import GIB
from benchmarks.train_step.ours import RunFigures, Setting
from benchmarks.train_step.peer import PeerFigures
from benchmarks.train_step.result import Row, TrainResult

_LEGEND = """\
ms: median of a step, with its tenth and ninth decile. TFLOP/s: U-Net forward and backward as
counted by torch.utils.flop_counter (what gradient checkpointing computes again is not counted).
floor: those FLOPs at the device's peak and the optimizer's bytes at its bandwidth.
GiB: on a GPU what torch allocated and reserved at the peak and, where the driver tells it, what
the whole process held (read once a second); on a CPU what the process held.
expected: what torch allocated at the peak of training / what the memory plan expected.
fast: with fast_step=True, whose steps are timed ten at a time. job: a whole job, with two
checkpoints, sample pictures and compute_fid; run: seconds from its start to its end."""


def name(setting: Setting) -> str:
    """Return the name of a row."""
    loss = "prior" if setting.with_prior_preservation else "plain"
    kind = "job " * setting.whole_job + "fast " * setting.fast_step
    return f"{loss} {kind}{setting.memory_plan}"


def show(result: TrainResult) -> None:
    """Print the tables and what their columns mean."""
    peak = result.peak
    print(
        f"{'setting':<32}{'ms':>9}{'p10-p90':>18}{'pictures/s':>12}{'TFLOP/s':>10}{'of floor':>10}"
        f"{'GiB':>18}{'of expected':>13}{'first step':>12}{'class image':>13}{'export':>9}"
        f"{'run':>9}"
    )
    for row in result.rows:
        title, figures = name(row.outcome.setting), row.outcome.figures
        print(_line(title, row, figures) if figures else f"{title:<32}{row.outcome.fault}")
        if row.peer is not None:
            theirs = row.peer.figures
            print(_peer_line(theirs) if theirs else f"{'  peer':<32}{row.peer.fault}")
        if row.ratios:
            print(
                f"{'  ratio':<32}{row.ratios['ratio']:9.2f}  whole run "
                f"{row.ratios['ratio_whole_run']:.2f} (without sampling class images)"
            )
    for row in result.rows:
        if row.outcome.setting.whole_job and row.outcome.figures is not None:
            _show_job(row.outcome.setting, row.outcome.figures)
    print(f"\n{_LEGEND}")
    print(f"peak: {peak.flop_per_s / 1e12:.3g} TFLOP/s, {peak.bytes_per_s / 1e9:.4g} GB/s", end=" ")
    print(f"({peak.source})")
    if result.graphs is not None:
        print(f"fast step: {result.graphs.in_words}")
    if result.stand_in:
        print("torchvision is missing: the peer ran with a small stand-in for its transforms")


def _line(title: str, row: Row, figures: RunFigures) -> str:
    sampling, of_expected = figures.class_image_s, figures.of_expected
    return (
        f"{title:<32}{_times(figures)}{row.rates['pictures_per_s']:12.2f}"
        f"{row.rates['tflop_per_s']:10.4g}{row.rates['share_of_floor']:10.1%}"
        f"{_memory(figures):>18}{'-' if of_expected is None else f'{of_expected:.1%}':>13}"
        f"{figures.first_step_s:10.1f} s{_seconds(sampling, 13)}{_seconds(figures.export_s, 9)}"
        f"{figures.run_s:7.1f} s"
    )


def _peer_line(theirs: PeerFigures) -> str:
    blank = " " * 32  # no pictures/s, TFLOP/s and share of the floor: the ratio line compares
    return (
        f"{'  peer':<32}{_times(theirs)}{blank}{_memory(theirs):>18}{'':13}"
        f"{theirs.first_step_s:10.1f} s{'':22}{theirs.run_s:7.1f} s"
    )


def _show_job(setting: Setting, figures: RunFigures) -> None:
    memory = figures.memory
    print(
        f"\n{name(setting)}, by {figures.memory_plan}: {figures.run_s:.1f} s from start to end, "
        f"a checkpoint {_seconds(figures.checkpoint_s, 0)}, server ready after "
        f"{_seconds(figures.ready_s, 0)}"
    )
    print(f"{'phase':<20}{'seconds':>9}{'times':>7}{'GiB':>18}")
    for title, phase in (memory.phases if memory else {}).items():
        sizes = _sizes(phase.allocated, phase.reserved, phase.process)
        print(f"{title:<20}{phase.seconds:>9.2f}{phase.times:>7}{sizes:>18}")


def _seconds(seconds: float | None, width: int) -> str:
    return f"{'-' if seconds is None else f'{seconds:.2f} s':>{width}}"


def _times(figures: RunFigures | PeerFigures) -> str:
    times = figures.times
    return f"{times.median_ms:9.1f}{f'{times.p10_ms:.1f}-{times.p90_ms:.1f}':>18}"


def _memory(figures: RunFigures | PeerFigures) -> str:
    memory = figures.memory
    if memory is None:
        return "-"
    if memory.allocated is None:
        return f"{memory.resident / GIB:.2f}"
    return _sizes(memory.allocated, memory.reserved, memory.process)


def _sizes(*sizes: int | None) -> str:
    """Return the known sizes in GiB as in 12.00/13.00/14.10, or - if none is known."""
    return "/".join(f"{size / GIB:.2f}" for size in sizes if size is not None) or "-"
