"""The fast step's training loop: half weights, replayed CUDA graphs, metrics read rarely."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from dreambooth.fast.graphed_passes import Capture, GraphedPasses, without_capture
from dreambooth.fast.master_weights import MasterWeights
from dreambooth.settings.hyperparameters import Hyperparameters
from dreambooth.training.loop import (
    MicroBatch,
    TrainedNetworks,
    TrainingData,
    count_skipped,
    forward_backward,
    micro_batches,
    set_learning_rate,
)
from dreambooth.training.plan import TrainingPlan
from dreambooth.training.state import TrainingState
from dreambooth.training.step_metrics import DeviceMetrics, StepMetrics, read_together

READ_EVERY = 10


def train(
    state: TrainingState,
    data: TrainingData,
    plan: TrainingPlan,
    hyperparameters: Hyperparameters,
    *,
    noise_scheduler: Any,
    encode_text: Callable[[torch.Tensor], torch.Tensor],
    prior_unet: nn.Module | None = None,
    accelerator: Accelerator,
    capture: Capture = without_capture,
) -> Iterator[StepMetrics]:
    """Train as `training.loop.train` does, with the same arguments and errors.

    The metrics of several steps are yielded one after the other when the last of them is done, so
    sample and save only if metrics.step equals state.step. capture: captures the passes as a CUDA
    graph.
    """
    masters = MasterWeights(state, hyperparameters.max_grad_norm)
    networks = accelerator.prepare(TrainedNetworks(masters.unet, None, encode_text))

    names: list[str] = []  # of the tensors that micro-batches of this run have

    def one_pass(*given: torch.Tensor) -> torch.Tensor:
        micro_batch = MicroBatch(**dict(zip(names, given, strict=True)))
        return forward_backward(
            networks, micro_batch, plan, hyperparameters, state.precision, half_weights=True
        )

    run_pass = GraphedPasses(one_pass, list(masters.unet.parameters()), capture)

    def passes() -> torch.Tensor:
        (made,) = micro_batches(  # fast_step does not go with gradient_accumulation_steps
            state, data, plan, hyperparameters, accelerator, noise_scheduler, prior_unet
        )
        there = {field.name: getattr(made, field.name) for field in fields(made)}
        there = {name: tensor for name, tensor in there.items() if tensor is not None}
        names[:] = there
        return run_pass(*there.values())

    is_read = reading_steps(state, plan, hyperparameters)
    unread: list[DeviceMetrics] = []
    skipped_in_a_row = 0

    while state.step < plan.steps:
        learning_rate = set_learning_rate(state, plan, hyperparameters)
        losses = accelerator.reduce(masters.collect(passes), "mean")
        step = state.step + 1
        unread.append(DeviceMetrics(step, learning_rate, losses, masters.norm()))
        metrics: list[StepMetrics] = []
        if is_read(step):
            with_class = data.class_text is not None
            metrics = read_together(unread, state, plan, with_class=with_class)
            unread.clear()
        if not masters.update(passes):  # fp16 overflow; fp16 reads metrics at every step
            skipped_in_a_row = count_skipped(state, metrics[-1], skipped_in_a_row)
            continue
        skipped_in_a_row = 0
        state.step = step
        for each in metrics:
            state.loss_total += each.loss
        yield from metrics


def reading_steps(
    state: TrainingState, plan: TrainingPlan, hyperparameters: Hyperparameters
) -> Callable[[int], bool]:
    """Return a function from a step's number to whether metrics are read right after it.

    They are read at the first and the last step, before each checkpoint and sample picture, and at
    every tenth step. fp16 reads them at every step, because a step whose gradients overflow must be
    repeated before the next one.
    """
    every = 1 if state.precision.scaler.is_enabled() else READ_EVERY
    rhythms = (every, plan.checkpointing_steps, hyperparameters.sample_steps)
    ends = (state.step + 1, plan.steps)
    return lambda step: step in ends or any(n and step % n == 0 for n in rhythms)
