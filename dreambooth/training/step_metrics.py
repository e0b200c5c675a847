"""Reads the metrics of one step, or of several at once, from the device."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from dreambooth.data import sample_draws
from dreambooth.errors import TrainingDivergedError
from dreambooth.training.plan import TrainingPlan
from dreambooth.training.state import TrainingState


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """The metrics of one step. Losses are means over its micro-batches; grad_norm is unclipped.

    read_with: how many steps were read together. When they are yielded, the weights are those after
    the last of these steps. subject_losses: (name, instance loss) of those of several subjects that
    the step has samples of. kept_loss: of the prompts of the base's subjects, where they are kept.
    """

    step: int
    epoch: float
    loss: float
    instance_loss: float
    class_loss: float | None
    learning_rate: float
    grad_norm: float
    read_with: int = field(default=1, compare=False)
    subject_losses: tuple[tuple[str, float], ...] = ()
    kept_loss: float | None = None


class DeviceMetrics(NamedTuple):
    """A step's metrics, with the losses of `loop.forward_backward` and the norm on the device."""

    step: int
    learning_rate: float
    losses: torch.Tensor
    grad_norm: torch.Tensor


def read_metrics(
    state: TrainingState,
    plan: TrainingPlan,
    losses: torch.Tensor,
    grad_norm: torch.Tensor,
    learning_rate: float,
    *,
    with_class: bool,
) -> StepMetrics:
    """Read the metrics of the current step. Raises TrainingDivergedError if it diverged."""
    unread = DeviceMetrics(state.step + 1, learning_rate, losses, grad_norm)
    (metrics,) = read_together([unread], state, plan, with_class=with_class)
    return metrics


def read_together(
    unread: list[DeviceMetrics], state: TrainingState, plan: TrainingPlan, *, with_class: bool
) -> list[StepMetrics]:
    """Read the metrics of several steps, waiting for the device once.

    Raises TrainingDivergedError for the first step that diverged.
    """
    figures = torch.stack([torch.cat((one.losses, one.grad_norm.float()[None])) for one in unread])
    metrics = [
        StepMetrics(
            step=one.step,
            epoch=plan.epoch(one.step),
            loss=loss,
            instance_loss=instance_loss,
            class_loss=class_loss if with_class else None,
            learning_rate=one.learning_rate,
            grad_norm=grad_norm,
            read_with=len(unread),
            subject_losses=_subject_losses(one.step, plan, more[: len(plan.subjects)]),
            kept_loss=more[-1] if plan.kept_subjects else None,
        )
        for one, (loss, instance_loss, class_loss, *more, grad_norm) in zip(
            unread, figures.tolist(), strict=True
        )
    ]
    for each in metrics:
        refuse_not_finite(each, state)
    return metrics


def _subject_losses(
    step: int, plan: TrainingPlan, sums: list[float]
) -> tuple[tuple[str, float], ...]:
    """Return each subject's mean loss. sums: over micro-batches and processes, divided by both."""
    micro_batches = plan.gradient_accumulation_steps * plan.processes
    first = (step - 1) * micro_batches * plan.batch_size
    found = []
    for number, (subject, total) in enumerate(zip(plan.subjects, sums, strict=True)):
        samples = range(first, first + micro_batches * plan.batch_size)
        of_subject = [
            sample
            for sample in samples
            if sample_draws.subject_of(sample, len(plan.subjects))[0] == number
        ]
        if of_subject:
            found.append((subject.name, total * micro_batches / len(of_subject)))
    return tuple(found)


def refuse_not_finite(metrics: StepMetrics, state: TrainingState, force: bool = False) -> None:
    """Raise TrainingDivergedError if the loss or the gradient norm is not finite.

    With loss scaling (fp16) a gradient norm that is not finite is no error, unless `force` is set.
    """
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
