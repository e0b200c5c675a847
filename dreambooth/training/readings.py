"""What a step tells of itself, read from the device: for one step, or for several at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from dreambooth.errors import TrainingDivergedError
from dreambooth.hyperparameters import Hyperparameters
from dreambooth.training.plan import TrainingPlan
from dreambooth.training.state import TrainingState

READ_EVERY = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """Of one step: losses are means over its micro-batches; grad_norm is that before clipping.

    read_with: how many steps' figures were read at once; weights are those after the last of them.
    """

    step: int
    epoch: float
    loss: float
    instance_loss: float
    class_loss: float | None
    learning_rate: float
    grad_norm: float
    read_with: int = field(default=1, compare=False)


def rhythm(
    state: TrainingState, plan: TrainingPlan, hyperparameters: Hyperparameters
) -> Callable[[int], bool]:
    """Whether a step is read as soon as it is made: without the fast step, every one.

    With it the first, the last, each before a checkpoint or a sample picture, and every tenth. fp16
    reads all: only so is a step whose gradients overflow tried again before the next.
    """
    every = READ_EVERY if plan.fast_step and not state.precision.scaler.is_enabled() else 1
    rhythms = (every, plan.checkpointing_steps, hyperparameters.sample_steps)
    ends = (state.step + 1, plan.steps)
    return lambda step: step in ends or any(n and step % n == 0 for n in rhythms)


class Unread(NamedTuple):
    """A step whose losses [3] and norm are still the device's."""

    step: int
    learning_rate: float
    losses: torch.Tensor
    grad_norm: torch.Tensor


def read(
    unread: list[Unread], state: TrainingState, plan: TrainingPlan, *, with_class: bool
) -> list[StepMetrics]:
    """Wait for the device, once for all of them. Raises TrainingDivergedError, naming the step."""
    figures = torch.stack([torch.cat((one.losses, one.grad_norm.float()[None])) for one in unread])
    found = [
        StepMetrics(
            step=one.step,
            epoch=plan.epoch(one.step),
            loss=loss,
            instance_loss=instance_loss,
            class_loss=class_loss if with_class else None,
            learning_rate=one.learning_rate,
            grad_norm=grad_norm,
            read_with=len(unread),
        )
        for one, (loss, instance_loss, class_loss, grad_norm) in zip(
            unread, figures.tolist(), strict=True
        )
    ]
    for metrics in found:
        refuse_not_finite(metrics, state)
    return found


def refuse_not_finite(metrics: StepMetrics, state: TrainingState, force: bool = False) -> None:
    """Raise TrainingDivergedError; fp16 gradients that overflow are the loss scaler's business."""
    scaled = state.precision.scaler.is_enabled() and not force
    if math.isfinite(metrics.loss) and (math.isfinite(metrics.grad_norm) or scaled):
        return
    what = "gradient" if math.isfinite(metrics.loss) else "loss"
    half = state.precision.dtype != torch.float32
    kept = f" The last good checkpoint is {state.checkpoint}." if state.checkpoint else ""
    raise TrainingDivergedError(
        f"The {what} is not finite at step {metrics.step} (learning rate "
        f"{metrics.learning_rate:g}): training has diverged. Lower learning_rate"
        f"{' or set mixed_precision=no' * half}.{kept}",
        step=metrics.step,
    )
