"""Which errors mean that the GPU's memory is used up, and what the user can do."""

from __future__ import annotations

import torch

from dreambooth.settings.hyperparameters import MemoryPlan
from dreambooth.training import memory_plan
from dreambooth.training.plan import TrainingPlan

# Libraries that allocate for themselves say it in an error of no class of its own.
_SIGNS = ("CUDA out of memory", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")


def is_meant_by(error: BaseException) -> bool:
    """Whether it says so, or what it was raised from or came up in: a capture that runs out of
    memory fails once more when it is ended.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS):
        return True
    earlier = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return earlier is not None and is_meant_by(earlier)


def advice(plan: TrainingPlan) -> str:
    """The sentence for the user whose job ends by it."""
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
