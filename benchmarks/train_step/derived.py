"""Derive from counts how long a step takes on cards on which nobody has measured it.

Every operation of the full-size U-Net's forward and backward pass is counted (on tensors without
memory): its FLOPs, the bytes that it reads and writes, and one kernel launch. An operation takes
the longer of FLOPs / peak and bytes / bandwidth, the optimizer takes its bytes / bandwidth, and a
step takes the longer of all these and all launches. Nothing else overlaps, no kernel is fused, and
every kernel reaches its card's figures. A T4 limited to 70 W reaches about half of its peak, so
times at the peak and at an estimated sustained rate are both shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from benchmarks.train_step import full_size, work
from benchmarks.train_step.goals import step_ms
from benchmarks.train_step.work import PeakRates
from dreambooth.settings.hyperparameters import MEMORY_PLANS

LAUNCH_S = 8e-6
"""The time that Python and torch need per operation on a cloud machine's core."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownCard:
    """A card; sustained_flop_per_s: what it is estimated to sustain; goal_s: per step."""

    name: str
    peak: PeakRates
    sustained_flop_per_s: float
    mixed_precision: str
    goal_s: float


CARDS = (
    KnownCard(
        name="T4",
        peak=work.CARDS["Tesla T4"],
        sustained_flop_per_s=30e12,
        mixed_precision="fp16",
        goal_s=step_ms("T4", "8bit_adamw prior") / 1000,
    ),
    KnownCard(
        name="A10G",
        peak=work.CARDS["NVIDIA A10G"],
        sustained_flop_per_s=50e12,
        mixed_precision="bf16",
        goal_s=step_ms("A10G", "fp32_adamw prior") / 1000,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One kernel launch: its floating-point operations, and the bytes read and written."""

    flops: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """The totals of one forward and backward pass."""

    flops: int
    bytes: int
    launches: int


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


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every operation that computes; views cost nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func not in _FREE:
            tensors = [t for t in tree_leaves((args, kwargs, result)) if torch.is_tensor(t)]
            moved = sum(t.numel() * t.element_size() for t in tensors)
            flops = _flops(func, args, kwargs or {}, result)
            self.operations.append(Operation(flops=flops, bytes=moved))
        return result


_ATEN = torch.ops.aten
_FREE = frozenset(
    {_ATEN.empty.memory_format, _ATEN.empty_like.default, _ATEN.detach.default}
    | {_ATEN._unsafe_view.default, torch.ops.prim.device.default}
)
_ATTENTION = _ATEN._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    if func._overloadpacket is _ATTENTION:  # torch has a formula for CUDA only
        return int(sdpa_flop_count(*(t.shape for t in args[:3])))  # type: ignore[no-untyped-call]
    if func._overloadpacket is _ATTENTION_BACKWARD:
        shapes = [t.shape for t in args[:4]]
        return int(sdpa_backward_flop_count(*shapes))  # type: ignore[no-untyped-call]
    formula = flop_registry.get(func._overloadpacket)
    return int(formula(*args, **kwargs, out_val=result)) if formula else 0


@contextmanager
def _autocast_as_on_cuda() -> Iterator[None]:
    """Make the CPU's autocast normalise in fp32, as CUDA's does; nothing else differs here."""
    group, layer = functional.group_norm, functional.layer_norm

    def in_fp32(call: Any) -> Any:
        def normalise(x: Any, *rest: Any) -> Any:
            with torch.autocast("cpu", enabled=False):
                return call(x.float(), *rest)

        return normalise

    with (
        mock.patch.object(functional, "group_norm", in_fp32(group)),
        mock.patch.object(functional, "layer_norm", in_fp32(layer)),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        yield


def count(pictures: int, *, autocast: bool) -> list[Operation]:
    """Return the operations of a forward and backward pass on 512 x 512 pictures in half precision.

    autocast: fp32 weights, cast when they are used; otherwise all weights are in half precision.
    """
    from diffusers import UNet2DConditionModel

    with FakeTensorMode():
        unet = UNet2DConditionModel(**full_size.UNET)
        dtype = torch.float32 if autocast else torch.bfloat16
        for parameter in unet.parameters():
            parameter.data = parameter.data.to(dtype)
        latents = torch.empty(pictures, 4, full_size.SIDE // 8, full_size.SIDE // 8, dtype=dtype)
        timesteps = torch.empty(pictures, dtype=torch.long)
        text = torch.empty(pictures, full_size.TOKENS, full_size.WIDTH, dtype=dtype)
        with _Counting() as counting:
            with _autocast_as_on_cuda() if autocast else nullcontext():
                loss = unet(latents, timesteps, text).sample.float().pow(2).mean()
            loss.backward()
    operations: list[Operation] = counting.operations
    return operations


def total(operations: Sequence[Operation]) -> Counts:
    """Add up the operations."""
    return Counts(
        flops=sum(operation.flops for operation in operations),
        bytes=sum(operation.bytes for operation in operations),
        launches=len(operations),
    )


def gpu_seconds(operations: Sequence[Operation], flop_per_s: float, bytes_per_s: float) -> float:
    """Return the seconds of the operations in sequence, each limited by computing or by memory."""
    return sum(
        max(operation.flops / flop_per_s, operation.bytes / bytes_per_s) for operation in operations
    )


def bytes_after_backward(weights: str, memory_plan: str, mixed_precision: str) -> int:
    """Return the bytes per parameter that are moved after the backward pass.

    With autocast, unscaling (fp16), norm, clipping and a fused AdamW are one pass each. Half
    weights need only the two passes of `work.optimizer_bytes`.
    """
    if weights == "half":
        return work.optimizer_bytes(memory_plan, mixed_precision)
    unscaling = 8 if mixed_precision == "fp16" else 0
    return unscaling + 4 + 8 + (16 if MEMORY_PLANS[memory_plan].use_8bit_adam else 28)


def derive(pictures: int = 2) -> tuple[dict[str, Counts], list[Derived]]:
    """Derive steps for autocast and half weights, on each card, in the two fastest memory plans."""
    counted = {
        "autocast": count(pictures, autocast=True),
        "half": count(pictures, autocast=False),
    }
    rows = []
    for card in CARDS:
        for weights, operations in counted.items():
            for plan in ("fp32_adamw", "8bit_adamw"):
                each = bytes_after_backward(weights, plan, card.mixed_precision)
                optimizer_s = each * full_size.PARAMETERS["unet"] / card.peak.bytes_per_s
                at_peak, sustained = (
                    gpu_seconds(operations, flop_per_s, card.peak.bytes_per_s) + optimizer_s
                    for flop_per_s in (card.peak.flop_per_s, card.sustained_flop_per_s)
                )
                rows.append(
                    Derived(
                        card=card.name,
                        weights=weights,
                        memory_plan=plan,
                        gpu_s=at_peak,
                        sustained_s=sustained,
                        launch_s=len(operations) * LAUNCH_S,
                        goal_s=card.goal_s,
                    )
                )
    return {name: total(operations) for name, operations in counted.items()}, rows


def show(counts: Mapping[str, Counts], rows: Sequence[Derived]) -> None:
    """Print the counts and the derived times, marked as not measured."""
    print("DERIVED, not measured: full size, 512 x 512, an instance and a class image a step")
    for name, counted in counts.items():
        print(
            f"  {name:<9} {counted.flops / 1e12:.2f} TFLOP, {counted.bytes / 1e9:.1f} GB, "
            f"{counted.launches} launches, forward and backward"
        )
    print(f"{'card':<6}{'weights':<10}{'memory plan':<14}{'at peak':>9}{'held':>9}", end="")
    print(f"{'launches':>10}{'step':>9}{'goal':>9}")
    for row in rows:
        cells = (row.gpu_s, row.sustained_s, row.launch_s, row.step_s, row.goal_s)
        times = "".join(f"{f'{cell:.3f} s':>{9 + (n == 2)}}" for n, cell in enumerate(cells))
        print(f"{row.card:<6}{row.weights:<10}{row.memory_plan:<14}{times}")
    held = ", ".join(f"{card.name} {card.sustained_flop_per_s / 1e12:g}" for card in CARDS)
    print(f"held: at the TFLOP/s that a card is estimated to hold ({held}); each operation takes")
    print("the longer of computing and memory, nothing overlaps. autocast: what mixed_precision")
    print(
        "does, fp32 weights and a pass each for norm, clipping and a fused AdamW; half: weights in"
    )
    print("half precision beside fp32 masters, and two passes in all.")


def document(counts: Mapping[str, Counts], rows: Sequence[Derived]) -> dict[str, Any]:
    """Return the JSON document."""
    return {
        "benchmark": "train",
        "derived": True,
        "counts": {name: asdict(counted) for name, counted in counts.items()},
        "cards": [{**asdict(row), "step_s": row.step_s} for row in rows],
    }
