"""The memory plan of a job: the one that is named, or the fastest that fits what is free.

Standard library only: the plan of a job prints its choice before anything heavy is loaded.
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

# Of what is free, beyond the tensors: library workspaces and fragmentation (facts of a T4, 14.6 GiB
# of which leave 13.4, and of an 8 GB card, 7.6 and 6.4, less the CUDA context).
OVERHEAD_BYTES = int(0.8 * 2**30)
MARGIN = 1.05  # how far the expectation may be below what is measured


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryChoice:
    """A memory plan for one job, with what is set by hand in it.

    name: of the plan that runs, with the switch in which it differs from the table's, if in one.
    expected_bytes: peak of the step, 0: not known. phases: of all phases, none where not known.
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
) -> tuple[MemoryChoice, ...]:
    """The named plan alone; or the fastest that fits, and behind it those to go over to.

    Raises HyperparameterError where the named plan cannot train this job.
    """
    may_step_fast = not why_no_fast_step(
        hyperparameters, device, mixed_precision=mixed_precision, processes=processes
    )
    usable = usable_bytes(device)
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
    fitting = (n for n, one in enumerate(choices) if _fits(one, usable))
    return tuple(choices[next(fitting, len(choices) - 1) :])


def name_of(memory_plan: MemoryPlan) -> str:
    """The table's name of a plan; for one that is not in it, the nearest with its other switch."""
    names = {named: name for name, named in MEMORY_PLANS.items()}
    if memory_plan in names:
        return names[memory_plan]
    switch = memory_plan.gradient_checkpointing
    nearest = memory_plan._replace(gradient_checkpointing=not switch)
    return f"{names[nearest]} with gradient_checkpointing={switch}"


def smaller_than(memory_plan: MemoryPlan) -> Iterator[str]:
    """Names of the table's plans that take less memory than this one, fastest first."""
    for name, other in MEMORY_PLANS.items():
        if _size(other) < _size(memory_plan):
            yield name


def why_no_fast_step(
    hyperparameters: Hyperparameters, device: DeviceFacts, *, mixed_precision: str, processes: int
) -> str | None:
    """What of this machine keeps fast_step from being taken, whatever the memory plan."""
    if device.kind != "cuda":
        return f"there is no CUDA graph on {device.name}"
    if mixed_precision == "no":
        return "mixed_precision=no has no half weights"
    return f"this job has {processes} processes" if processes > 1 else None


def usable_bytes(device: DeviceFacts) -> int | None:
    """What tensors may take of the GPU's free memory; None on a CPU."""
    free = device.memory_bytes if device.free_bytes is None else device.free_bytes
    return None if free is None else max(0, free - OVERHEAD_BYTES)


def _fits(choice: MemoryChoice, usable: int) -> bool:
    """Whether its phases do; those that are the same in all plans do not tell plans apart."""
    of_plan = filter(expected_memory.depends_on_the_memory_plan, choice.phases)
    return all(peak.bytes * MARGIN <= usable for peak in of_plan)


def _candidates(hyperparameters: Hyperparameters, processes: int) -> Sequence[MemoryPlan]:
    """Fastest first, none twice. What is set by hand stands in all of them."""
    named = MEMORY_PLANS.get(hyperparameters.memory_plan)
    if named is not None:
        if named.frees_gradients and processes > 1:
            raise HyperparameterError(
                f"memory_plan={hyperparameters.memory_plan} trains in one process, and this job "
                f"has {processes}: start it without accelerate launch, or set memory_plan=auto."
            )
        return [named]
    found: list[MemoryPlan] = []
    adds_up = hyperparameters.gradient_accumulation_steps > 1 or processes > 1
    for memory_plan in MEMORY_PLANS.values():
        if not memory_plan.is_automatic or (memory_plan.frees_gradients and adds_up):
            continue
        memory_plan = _with_what_is_set(memory_plan, hyperparameters)
        # fp32 states are larger than the gradients that are freed: behind 8 bits they save nothing.
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


def _size(memory_plan: MemoryPlan) -> tuple[float, bool, bool]:
    """What orders plans by memory: bytes per weight, then those of activations."""
    weight = 2 if memory_plan.rounds_stochastically else 4
    gradient = 0 if memory_plan.frees_gradients else weight
    states = expected_memory.states_bytes(memory_plan)
    return (
        weight + gradient + states,
        not memory_plan.rounds_stochastically,
        not memory_plan.gradient_checkpointing,
    )
