"""Chooses the memory plan of a job: the named one, or the fastest that fits the free memory.

Standard library only: a job prints the choice before anything heavy is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dreambooth.errors import HyperparameterError
from dreambooth.model_folder.facts import ModelFacts
from dreambooth.settings.hyperparameters import MEMORY_PLANS, Hyperparameters, MemoryPlan
from dreambooth.training import expected_memory
from dreambooth.training.device import DeviceFacts
from dreambooth.training.expected_memory import PhasePeak

# Free memory that tensors cannot use, because of library workspaces and fragmentation: a T4 leaves
# 13.4 of 14.6 GiB and an 8 GB card 6.4 of 7.6: 1.2 GiB with the CUDA context, 0.8 without it.
OVERHEAD_BYTES = int(0.8 * 2**30)
# What NCCL takes of each GPU beside torch's tensors: 688 MiB were seen on four A100s over NVLink,
# 544 on two (github.com/NVIDIA/nccl, issue 964). It grows with the channels, of which PCIe has
# fewer (issue 986), and not with the hosts; never measured here.
NCCL_BYTES = int(0.7 * 2**30)
MARGIN = 1.05  # the measured peak may exceed the expected one by this factor


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryChoice:
    """A memory plan for one job, including the switches that are set by hand.

    name: the table's name of the memory plan, with the one switch in which it differs, if any.
    expected_bytes: peak of a step; 0 if unknown. phases: peaks of all phases; none if unknown.
    """

    name: str
    memory_plan: MemoryPlan
    expected_bytes: int
    fast_step: bool = False
    phases: tuple[PhasePeak, ...] = ()


def choose(
    hyperparameters: Hyperparameters,
    facts: ModelFacts | None,
    device: DeviceFacts,
    *,
    mixed_precision: str,
    prior_precision: str = "no",
    class_images_to_sample: int = 0,
    processes: int = 1,
    keeps_subjects: bool = False,
    steps: int = 0,
    meter_prompts: int = 0,
) -> tuple[MemoryChoice, ...]:
    """Return the named memory plan; for auto, the fastest that fits and then those to fall back to.

    The last one is taken if none fits. keeps_subjects: as in `expected_memory.of_step`. steps,
    meter_prompts: as in `expected_memory.of_phases`. Raises HyperparameterError if the named memory
    plan cannot train this job.
    """
    may_step_fast = not fast_step_obstacle(
        hyperparameters, device, mixed_precision=mixed_precision, processes=processes
    )
    usable = usable_bytes(device, processes)
    batch = 0
    if facts is not None and class_images_to_sample > 0:
        batch = expected_memory.class_batch(hyperparameters, facts, prior_precision, usable)
    choices = []
    for memory_plan in _candidates(hyperparameters, processes):
        fast_step = hyperparameters.fast_step and may_step_fast and memory_plan.can_step_fast
        phases = expected_memory.of_phases(
            hyperparameters,
            facts,
            mixed_precision=mixed_precision,
            prior_precision=prior_precision,
            memory_plan=memory_plan,
            fast_step=fast_step,
            class_batch=batch,
            keeps_subjects=keeps_subjects,
            steps=steps,
            meter_prompts=meter_prompts,
        )
        step = [peak.bytes for peak in phases if peak.phase == "training"]
        choices.append(
            MemoryChoice(
                name=name_of(memory_plan),
                memory_plan=memory_plan,
                expected_bytes=sum(step),
                fast_step=fast_step,
                phases=phases,
            )
        )
    if usable is None or facts is None:
        return tuple(choices)
    fitting = (n for n, one in enumerate(choices) if fits(one.phases, device, processes))
    return tuple(choices[next(fitting, len(choices) - 1) :])


def name_of(memory_plan: MemoryPlan) -> str:
    """Return the table's name of a memory plan.

    For one that is not in the table, return the nearest name and the switch that differs.
    """
    names = {named: name for name, named in MEMORY_PLANS.items()}
    if memory_plan in names:
        return names[memory_plan]
    switch = memory_plan.gradient_checkpointing
    nearest = memory_plan._replace(gradient_checkpointing=not switch)
    return f"{names[nearest]} with gradient_checkpointing={switch}"


def smaller_than(memory_plan: MemoryPlan) -> Iterator[str]:
    """Yield the names of the memory plans that take less memory than this one, fastest first."""
    for name, other in MEMORY_PLANS.items():
        if _size(other) < _size(memory_plan):
            yield name


def fast_step_obstacle(
    hyperparameters: Hyperparameters, device: DeviceFacts, *, mixed_precision: str, processes: int
) -> str | None:
    """Return why this job cannot use fast_step, whatever the memory plan, or None if it can."""
    if device.kind != "cuda":
        return f"there is no CUDA graph on {device.name}"
    if mixed_precision == "no":
        return "mixed_precision=no has no half weights"
    return f"this job has {processes} processes" if processes > 1 else None


def usable_bytes(device: DeviceFacts, processes: int) -> int | None:
    """Return how much of the GPU's free memory tensors may take; None on a CPU."""
    free = device.memory_bytes if device.free_bytes is None else device.free_bytes
    others = OVERHEAD_BYTES + nccl_bytes(device, processes)
    return None if free is None else max(0, free - others)


def nccl_bytes(device: DeviceFacts, processes: int) -> int:
    """Return what NCCL's buffers take of each GPU."""
    return NCCL_BYTES if processes > 1 and device.kind == "cuda" else 0


def fits(phases: Sequence[PhasePeak], device: DeviceFacts, processes: int) -> bool:
    """Return whether the phases that depend on the memory plan fit into the device's free memory.

    The others are the same in all memory plans, so they do not help to choose one.
    """
    usable = usable_bytes(device, processes)
    of_plan = filter(expected_memory.depends_on_the_memory_plan, phases)
    return usable is None or all(peak.bytes * MARGIN <= usable for peak in of_plan)


def _candidates(hyperparameters: Hyperparameters, processes: int) -> Sequence[MemoryPlan]:
    """Return the memory plans to choose from, fastest first.

    That is the named one alone, or for auto all that can train this job, without repetitions and
    with the switches that are set by hand.
    """
    named = MEMORY_PLANS.get(hyperparameters.memory_plan)
    if named is not None:
        if named.frees_gradients and processes > 1:
            raise HyperparameterError(
                f"memory_plan={hyperparameters.memory_plan} trains in one process, and this job "
                f"has {processes}: set processes=1 (and start no launcher), or memory_plan=auto."
            )
        return [named]
    found: list[MemoryPlan] = []
    adds_up = hyperparameters.gradient_accumulation_steps > 1 or processes > 1
    for memory_plan in MEMORY_PLANS.values():
        if memory_plan.frees_gradients and adds_up:
            continue
        memory_plan = _with_what_is_set(memory_plan, hyperparameters)
        # After 8-bit states, fp32 states would cost more memory than freeing the gradients saves.
        widens = not memory_plan.use_8bit_adam and any(earlier.use_8bit_adam for earlier in found)
        if memory_plan not in found and not widens:
            found.append(memory_plan)
    return found


def _with_what_is_set(memory_plan: MemoryPlan, hyperparameters: Hyperparameters) -> MemoryPlan:
    eight_bit, checkpointing = hyperparameters.use_8bit_adam, hyperparameters.gradient_checkpointing
    if eight_bit is not None:
        memory_plan = memory_plan._replace(use_8bit_adam=eight_bit)
    if checkpointing is not None:
        memory_plan = memory_plan._replace(gradient_checkpointing=checkpointing)
    return memory_plan


def _size(memory_plan: MemoryPlan) -> tuple[float, bool]:
    """Return a key that orders memory plans by memory: bytes beside a weight, then activations."""
    gradient = 0 if memory_plan.frees_gradients else 4
    states = expected_memory.states_bytes(memory_plan)
    return gradient + states, not memory_plan.gradient_checkpointing
