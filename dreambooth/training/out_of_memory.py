"""Recognises errors that mean that the GPU's memory is used up, and advises the user."""

from __future__ import annotations

import torch

from dreambooth.settings.hyperparameters import MemoryPlan
from dreambooth.training import memory_plan
from dreambooth.training.plan import TrainingPlan

# Libraries that allocate for themselves raise a RuntimeError with one of these texts.
_SIGNS = ("CUDA out of memory", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")


def ran_out(error: BaseException) -> bool:
    """Return whether an error, or an earlier one in its chain, means that GPU memory ran out.

    The chain matters because a capture that runs out of memory fails once more when it is ended.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS):
        return True
    earlier = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return earlier is not None and ran_out(earlier)


def advice(plan: TrainingPlan) -> str:
    """Return the sentence for a user whose job ended because the GPU ran out of memory."""
    running = MemoryPlan(
        plan.use_8bit_adam,
        plan.gradient_checkpointing,
        frees_gradients=plan.frees_gradients,
        rounds_stochastically=plan.rounds_stochastically,
    )
    smaller = list(memory_plan.smaller_than(running))
    by_plan = f", or set memory_plan to {' or '.join(smaller)}" if smaller else ""
    return (
        f"The GPU ran out of memory (memory_plan {plan.memory_plan}): lower batch_size or "
        f"resolution{by_plan}."
    )
