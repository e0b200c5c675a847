"""What a plan warns of: one sentence each. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence

from dreambooth.settings.hyperparameters import Hyperparameters
from dreambooth.training import expected_memory, memory_plan
from dreambooth.training.device import DeviceFacts, host_memory_bytes
from dreambooth.training.expected_memory import PhasePeak, shown
from dreambooth.training.memory_plan import MemoryChoice


def of_memory(device: DeviceFacts, phases: Sequence[PhasePeak]) -> tuple[str, ...]:
    """Where the largest phase does not fit."""
    usable = memory_plan.usable_bytes(device)
    there = host_memory_bytes() if usable is None else usable
    most = expected_memory.largest(phases)
    if most is None or not most.bytes > there > 0:
        return ()
    smaller = ", or choose a smaller memory_plan" * expected_memory.depends_on_the_memory_plan(most)
    return (
        f"The run is expected to take {shown(most.bytes)} of memory in {most.phase}, and "
        f"{device.name} has {shown(there)} to give: lower batch_size or resolution{smaller}.",
    )


def of_settings(
    hyperparameters: Hyperparameters,
    device: DeviceFacts,
    mixed_precision: str,
    steps: int,
    warmup: int,
) -> tuple[str, ...]:
    """Of settings that do nothing here, or not what was meant."""
    notes = []
    if hyperparameters.lr_scheduler == "constant" and warmup:
        notes.append(
            f"lr_warmup_steps={warmup} has no effect with lr_scheduler=constant; "
            "use constant_with_warmup."
        )
    elif warmup >= steps:
        notes.append(
            f"lr_warmup_steps={warmup} is not below the {steps} steps of this run: "
            "the learning rate never reaches its full value."
        )
    if mixed_precision == "bf16" and device.mixed_precision == "fp16":
        notes.append(
            f"{device.name} computes bf16 slowly (compute capability below 8.0); use fp16."
        )
    if mixed_precision == "fp16" and device.kind == "cpu":
        notes.append("fp16 on a CPU is slow and less exact than the default, fp32.")
    return tuple(notes)


def of_the_fast_step(
    hyperparameters: Hyperparameters,
    device: DeviceFacts,
    mixed_precision: str,
    processes: int,
    chosen: MemoryChoice,
) -> tuple[str, ...]:
    """Why it is asked for and not taken."""
    if not hyperparameters.fast_step or chosen.fast_step:
        return ()
    why = memory_plan.why_no_fast_step(
        hyperparameters, device, mixed_precision=mixed_precision, processes=processes
    )
    return (f"fast_step is left out: {why or f'it does not go with {chosen.name}'}.",)
