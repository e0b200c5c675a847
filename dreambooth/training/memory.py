"""How many bytes a run will take, computed from the model's facts; the memory plan that fits.

Standard library only: the plan of a job prints these before anything heavy is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dreambooth.diffusion.facts import ModelFacts
from dreambooth.errors import HyperparameterError
from dreambooth.hyperparameters import MEMORY_PLANS, Hyperparameters, MemoryPlan
from dreambooth.training.device import DeviceFacts

# Of what is free, beyond the tensors: library workspaces and fragmentation (facts of a T4, 14.6 GiB
# of which leave 13.4, and of an 8 GB card, 7.6 and 6.4, less the CUDA context).
OVERHEAD_BYTES = int(0.8 * 2**30)
MARGIN = 1.05  # how far the expectation may be below what is measured

STATE_BYTES, STATE_BYTES_8BIT = 8.0, 2.03  # two moments; in 8 bits a scale per 256 of each
# Saved activations per latent cell, channel and layer, in tensors. Fitted to the live bytes of the
# full-size U-Net (1.74 GiB per 512 x 512 picture in fp32, 0.29 GiB with gradient checkpointing).
TENSORS_PER_LAYER = 39
TENSORS_PER_LAYER_CHECKPOINTED = 6.5
# Of all activations, those of the largest block, which alone is recomputed at a time.
LARGEST_BLOCK = 1 / 6
# Of gradients that the fast step holds in fp32 at a time (`master_weights.PART_ELEMENTS`).
PART_BYTES = 2**28
# Bytes per activation; under autocast matrix products are in half and normalisations in fp32.
FP32_BYTES, AUTOCAST_BYTES, HALF_BYTES = 4.0, 2.6, 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryChoice:
    """A memory plan for one job, with what is set by hand in it; expected_bytes 0: not known."""

    name: str
    plan: MemoryPlan
    expected_bytes: int
    fast_step: bool = False


def choose(
    hyperparameters: Hyperparameters,
    facts: ModelFacts | None,
    device: DeviceFacts,
    *,
    mixed_precision: str,
    processes: int = 1,
) -> tuple[MemoryChoice, ...]:
    """The named plan alone; or the fastest that fits, and behind it those to go over to.

    Raises HyperparameterError where the named plan cannot train this job.
    """
    may_step_fast = not why_no_fast_step(
        hyperparameters, device, mixed_precision=mixed_precision, processes=processes
    )
    choices = []
    for name, plan in _candidates(hyperparameters, processes):
        fast_step = hyperparameters.fast_step and may_step_fast and plan.can_step_fast
        expected_bytes = expected_memory_bytes(
            hyperparameters,
            facts,
            mixed_precision=mixed_precision,
            plan=plan,
            fast_step=fast_step,
        )
        choices.append(
            MemoryChoice(name=name, plan=plan, expected_bytes=expected_bytes, fast_step=fast_step)
        )
    usable = usable_bytes(device)
    if usable is None or facts is None:
        return tuple(choices)
    fitting = (n for n, one in enumerate(choices) if one.expected_bytes * MARGIN <= usable)
    return tuple(choices[next(fitting, len(choices) - 1) :])


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


def expected_memory_bytes(
    hyperparameters: Hyperparameters,
    facts: ModelFacts | None,
    *,
    mixed_precision: str,
    plan: MemoryPlan,
    fast_step: bool = False,
) -> int:
    """Peak of the step: weights, gradients, optimizer states, activations; 0: unknown."""
    if facts is None:
        return 0
    trained = _trained_parameters(hyperparameters, facts)
    half_weights = plan.rounds_stochastically or fast_step
    under_autocast = mixed_precision != "no" and not half_weights
    weights = (2 if plan.rounds_stochastically else 4) * trained
    gradients = 2 * trained if half_weights else weights
    optimizer = (STATE_BYTES_8BIT if plan.use_8bit_adam else STATE_BYTES) * trained
    each = AUTOCAST_BYTES if under_autocast else HALF_BYTES if half_weights else FP32_BYTES
    whole = each * _saved_activations(hyperparameters, facts)
    kept = whole
    if plan.gradient_checkpointing:
        kept *= TENSORS_PER_LAYER_CHECKPOINTED / TENSORS_PER_LAYER
    if fast_step:  # the half weights, and a part of their gradients in fp32
        weights += 2 * trained + PART_BYTES
    if _predicts_the_prior(hyperparameters):  # by a frozen copy
        weights += (4 if mixed_precision == "no" else 2) * facts.unet_parameters
    # Autocast's half copies of the weights; a checkpointed block makes its own again.
    copies = 2 * trained if under_autocast and not plan.gradient_checkpointing else 0
    if plan.frees_gradients:
        block = whole * LARGEST_BLOCK if plan.gradient_checkpointing else 0
        return int(weights + optimizer + kept + copies + block)
    # Either the start of the backward pass, or its end, where the gradients are whole and what is
    # saved for the last blocks is still there (fitted to the same simulation).
    return int(weights + optimizer + max(kept + copies, gradients + 0.3 * kept))


def _candidates(
    hyperparameters: Hyperparameters, processes: int
) -> Sequence[tuple[str, MemoryPlan]]:
    """(name, plan), fastest first, no plan twice. What is set by hand stands in all of them."""
    named = MEMORY_PLANS.get(hyperparameters.memory_plan)
    if named is not None:
        if named.frees_gradients and processes > 1:
            raise HyperparameterError(
                f"memory_plan={hyperparameters.memory_plan} trains in one process, and this job "
                f"has {processes}: start it without accelerate launch, or set memory_plan=auto."
            )
        return [(hyperparameters.memory_plan, named)]
    found: dict[MemoryPlan, str] = {}
    for name, plan in MEMORY_PLANS.items():
        adds_up = hyperparameters.gradient_accumulation_steps > 1 or processes > 1
        if plan.is_automatic and not (plan.frees_gradients and adds_up):
            found.setdefault(_with_what_is_set(plan, hyperparameters), name)
    return [(name, plan) for plan, name in found.items()]


def _with_what_is_set(plan: MemoryPlan, hyperparameters: Hyperparameters) -> MemoryPlan:
    eight_bit, checkpointing = hyperparameters.use_8bit_adam, hyperparameters.gradient_checkpointing
    if eight_bit is not None:
        plan = plan._replace(use_8bit_adam=eight_bit)
    if checkpointing is not None:
        plan = plan._replace(gradient_checkpointing=checkpointing)
    return plan


def _saved_activations(hyperparameters: Hyperparameters, facts: ModelFacts) -> float:
    """How many are kept for the backward pass, without gradient checkpointing."""
    resolution = hyperparameters.resolution or facts.resolution
    area: float = (resolution / facts.resolution) ** 2
    halves = 2 if hyperparameters.with_prior_preservation else 1
    pictures = hyperparameters.batch_size * halves
    return TENSORS_PER_LAYER * facts.unet_layer_elements * area * pictures


def _predicts_the_prior(hyperparameters: Hyperparameters) -> bool:
    return (
        hyperparameters.with_prior_preservation
        and hyperparameters.prior_preservation_mode == "prediction"
    )


def _trained_parameters(hyperparameters: Hyperparameters, facts: ModelFacts) -> int:
    text_encoder = facts.text_encoder_parameters if hyperparameters.train_text_encoder else 0
    return facts.unet_parameters + text_encoder
