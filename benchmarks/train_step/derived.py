"""Derive from counts how long a step takes on cards on which nobody has measured it.

Every operation of a full-size step is counted (`counted_step`): its FLOPs, the bytes that it reads
and writes, and one kernel launch. An operation takes the longer of FLOPs / peak and bytes /
bandwidth, and a step takes the longer of all these and all launches. Nothing else overlaps, no
kernel is fused, and every kernel reaches its card's figures. A T4 limited to 70 W reaches about
half of its peak, so times at the peak and at an estimated sustained rate are both shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.train_step import counted_step, work
from benchmarks.train_step.counted_step import Operation, StepCount
from benchmarks.train_step.goals import step_ms
from benchmarks.train_step.work import PeakRates
from dreambooth.training.device import DeviceFacts

LAUNCH_S = 8e-6
"""The time that Python and torch need per operation on a cloud machine's core."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownCard:
    """A card; sustained_flop_per_s: what it is estimated to sustain; goal_s: per step."""

    name: str
    device: DeviceFacts
    peak: PeakRates
    sustained_flop_per_s: float
    goal_s: float


CARDS = (
    KnownCard(
        name="T4",
        device=counted_step.T4,
        peak=work.CARDS["Tesla T4"],
        sustained_flop_per_s=30e12,
        goal_s=step_ms("T4", "8bit_adamw prior") / 1000,
    ),
    KnownCard(
        name="A10G",
        device=counted_step.A10G,
        peak=work.CARDS["NVIDIA A10G"],
        sustained_flop_per_s=50e12,
        goal_s=step_ms("A10G", "fp32_adamw prior") / 1000,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Derived:
    """The derived seconds of one step with prior preservation on a card.

    weights: "autocast" (fp32 weights, cast when used) or "half". gpu_s, sustained_s: U-Net and
    optimizer at the card's peak, and at the rate that it is estimated to sustain. launch_s: the
    launches alone; without CUDA graphs no step is shorter.
    """

    card: str
    weights: str
    memory_plan: str
    gpu_s: float
    sustained_s: float
    launch_s: float
    goal_s: float

    @property
    def step_s(self) -> float:
        """Return the longer of sustained_s and launch_s."""
        return max(self.sustained_s, self.launch_s)


def gpu_seconds(operations: Sequence[Operation], flop_per_s: float, bytes_per_s: float) -> float:
    """Return the seconds of the operations in sequence, each limited by computing or by memory."""
    return sum(
        max(operation.flops / flop_per_s, operation.bytes / bytes_per_s) for operation in operations
    )


def derive() -> list[tuple[StepCount, Derived]]:
    """Derive steps for autocast and half weights, on each card, in the two fastest memory plans."""
    found = []
    for card in CARDS:
        for weights in ("autocast", "half"):
            for plan in ("fp32_adamw", "8bit_adamw"):
                counted = counted_step.count(
                    card.device,
                    with_prior_preservation=True,
                    memory_plan=plan,
                    fast_step=weights == "half",
                )
                at_peak, sustained = (
                    gpu_seconds(counted.operations, flop_per_s, card.peak.bytes_per_s)
                    for flop_per_s in (card.peak.flop_per_s, card.sustained_flop_per_s)
                )
                derived = Derived(
                    card=card.name,
                    weights=weights,
                    memory_plan=plan,
                    gpu_s=at_peak,
                    sustained_s=sustained,
                    launch_s=counted.launches * LAUNCH_S,
                    goal_s=card.goal_s,
                )
                found.append((counted, derived))
    return found


_COLUMNS = ("card", "weights", "memory plan", "TFLOP", "GB", "launches", "waits")
_TIMES = ("at peak", "held", "launching", "step", "goal")
_EXPLANATION = """\
launches, waits: kernels that the host launches, times that it waits for the device. held: at the
TFLOP/s that a card is estimated to hold ({}); each operation takes the longer of computing and
memory, and nothing overlaps. autocast: what mixed_precision does; half: fast_step without its CUDA
graph. bitsandbytes' 8-bit kernels stand in: a launch each."""


def show(rows: Sequence[tuple[StepCount, Derived]]) -> None:
    """Print the counts and the derived times, marked as not measured."""
    print("DERIVED, not measured: full size, 512 x 512, an instance and a class image a step")
    print(_line(*_COLUMNS, *_TIMES))
    for counted, row in rows:
        times = (row.gpu_s, row.sustained_s, row.launch_s, row.step_s, row.goal_s)
        tera, giga = f"{counted.flops / 1e12:.2f}", f"{counted.bytes / 1e9:.1f}"
        counts = (tera, giga, str(counted.launches), str(len(counted.waits)))
        names = (row.card, row.weights, row.memory_plan)
        print(_line(*names, *counts, *(f"{seconds:.3f} s" for seconds in times)))
    held = ", ".join(f"{card.name} {card.sustained_flop_per_s / 1e12:g}" for card in CARDS)
    print(_EXPLANATION.format(held))


def _line(*cells: str) -> str:
    names = f"{cells[0]:<6}{cells[1]:<10}{cells[2]:<12}"
    return names + "".join(f"{cell:>10}" for cell in cells[3:])


def document(rows: Sequence[tuple[StepCount, Derived]]) -> dict[str, Any]:
    """Return the JSON document."""
    return {
        "benchmark": "train",
        "derived": True,
        "cards": [
            {
                **asdict(row),
                "step_s": row.step_s,
                "flops": counted.flops,
                "bytes": counted.bytes,
                "launches": counted.launches,
                "waits": len(counted.waits),
            }
            for counted, row in rows
        ],
    }
