"""Makes the warnings of a training plan, one sentence each. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence

from dreambooth.limits import size_in_words
from dreambooth.settings.hyperparameters import Hyperparameters
from dreambooth.training import expected_memory, memory_plan
from dreambooth.training.device import DeviceFacts, host_memory_bytes
from dreambooth.training.expected_memory import PhasePeak
from dreambooth.training.memory_plan import MemoryChoice


def memory_warnings(
    device: DeviceFacts, phases: Sequence[PhasePeak], processes: int
) -> tuple[str, ...]:
    """Return a warning if the phase that takes the most memory is not expected to fit."""
    usable = memory_plan.usable_bytes(device, processes)
    there = host_memory_bytes() if usable is None else usable
    most = expected_memory.largest(phases)
    if most is None or not most.bytes > there > 0:
        return ()
    smaller = ", or choose a smaller memory_plan" * expected_memory.depends_on_the_memory_plan(most)
    return (
        f"The run is expected to take {size_in_words(most.bytes)} of memory in {most.phase}, and "
        f"{device.name} has {size_in_words(there)} to give: "
        f"lower batch_size or resolution{smaller}.",
    )


def settings_warnings(
    hyperparameters: Hyperparameters,
    device: DeviceFacts,
    mixed_precision: str,
    steps: int,
    warmup: int,
    instance_images: int,
    has_class_prompt: bool,
) -> tuple[str, ...]:
    """Return warnings of settings that have no effect here, or probably an unwanted one."""
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
    if hyperparameters.compute_fid and instance_images < 2:
        notes.append(
            "compute_fid needs two instance images, and there is one: no fid_score will be printed."
        )
    if hyperparameters.compute_scores and not has_class_prompt:
        notes.append(
            "compute_scores needs a class_prompt, and dataset_info.json gives none: no class_kept "
            "will be printed, and a subject_score of the embedded world's models only."
        )
    return tuple(notes)


def fast_step_warnings(
    hyperparameters: Hyperparameters,
    device: DeviceFacts,
    mixed_precision: str,
    processes: int,
    chosen: MemoryChoice,
) -> tuple[str, ...]:
    """Return a warning that gives the reason if fast_step is asked for and cannot be used."""
    if not hyperparameters.fast_step or chosen.fast_step:
        return ()
    why = memory_plan.fast_step_obstacle(
        hyperparameters, device, mixed_precision=mixed_precision, processes=processes
    )
    return (f"fast_step is left out: {why or f'it does not go with {chosen.name}'}.",)
