"""Training that uses each gradient and frees it as soon as it is computed.

Together the gradients of a step take 3.2 GiB for Stable Diffusion. The factor that clips them is
known only after the last one, so the passes of a step are run twice: once for the norm, once for
the update. Clipping is as exact as in `loop.train`, at the price of a second forward and backward
pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from dreambooth.errors import TrainingDivergedError
from dreambooth.settings.hyperparameters import Hyperparameters
from dreambooth.training.loop import (
    TrainedNetworks,
    TrainingData,
    count_skipped,
    forward_backward,
    micro_batches,
    no_losses,
    set_learning_rate,
)
from dreambooth.training.optimizer import clip_factor, part_by_part
from dreambooth.training.plan import TrainingPlan
from dreambooth.training.state import TrainingState
from dreambooth.training.step_metrics import StepMetrics, read_metrics

# Runs the passes of one step: leaves gradients, returns the losses [3], or [3+S].
Passes = Callable[[], torch.Tensor]


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
) -> Iterator[StepMetrics]:
    """Train as `loop.train` does, with the same arguments, errors and, bit for bit, weights."""
    networks = accelerator.prepare(TrainedNetworks(state.unet, state.text_encoder, encode_text))
    gradients = FreedGradients(state, hyperparameters.max_grad_norm)
    skipped_in_a_row = 0

    def passes() -> torch.Tensor:
        losses = no_losses(plan, accelerator.device)
        for micro_batch in micro_batches(
            state, data, plan, hyperparameters, accelerator, noise_scheduler, prior_unet
        ):
            losses += forward_backward(
                networks, micro_batch, plan, hyperparameters, state.precision
            )
        return losses / plan.gradient_accumulation_steps

    while state.step < plan.steps:
        learning_rate = set_learning_rate(state, plan, hyperparameters)
        losses = accelerator.reduce(gradients.collect(passes), "mean")
        metrics = read_metrics(
            state,
            plan,
            losses,
            gradients.norm(),
            learning_rate,
            with_class=data.class_text is not None,
        )
        if not gradients.update(passes):  # fp16 overflow: repeat the step
            skipped_in_a_row = count_skipped(state, metrics, skipped_in_a_row)
            continue
        skipped_in_a_row = 0
        state.step += 1
        state.loss_total += metrics.loss
        yield metrics


class FreedGradients:
    """Processes the gradients of a step one at a time: collect, norm, update."""

    def __init__(self, state: TrainingState, max_grad_norm: float) -> None:
        self._state, self._precision = state, state.precision
        self._parameters = [w for group in state.optimizer.param_groups for w in group["params"]]
        self._max_norm = max_grad_norm
        self._scale = 1.0  # loss scale of this pass; asking the scaler waits for the device
        self._norms: dict[nn.Parameter, torch.Tensor] = {}
        self._norm = torch.zeros(())

    def collect(self, passes: Passes) -> torch.Tensor:
        """Run the passes of a step, note each gradient's norm, and return what they return."""

        def free(parameter: nn.Parameter) -> None:
            self._measure(parameter)
            parameter.grad = None

        with self._gradient_hooks(free):
            return passes()

    def norm(self) -> torch.Tensor:
        """Return the L2 norm of all gradients together, before clipping."""
        self._norm = self._norm_of_all()
        return self._norm

    def update(self, passes: Passes) -> bool:
        """Run the passes again and update each weight as soon as its gradient is there, clipped.

        Return False, without an update, if fp16 gradients overflowed. Raises TrainingDivergedError
        if a gradient of this second run is not finite.
        """
        if bool(torch.isfinite(self._norm)):
            factor = clip_factor(self._norm, self._max_norm)
            with part_by_part(self._state.optimizer) as step:

                def apply(parameter: nn.Parameter) -> None:
                    self._measure(parameter).mul_(factor)
                    step([parameter])
                    parameter.grad = None

                with self._gradient_hooks(apply):
                    passes()
            self._refuse_second_pass_not_finite()
        return self._precision.adapt_scale(self._norm)

    def _measure(self, parameter: nn.Parameter) -> torch.Tensor:
        """Unscale the gradient of a parameter, note its norm, and return it."""
        gradient = parameter.grad
        assert gradient is not None
        if self._scale != 1:
            gradient.mul_(1 / self._scale)
        self._norms[parameter] = torch.linalg.vector_norm(gradient)
        return gradient

    def _norm_of_all(self) -> torch.Tensor:
        """Return the norm of all gradients, taken in the parameters' order.

        The order of arrival may differ from run to run and would change the last bits.
        """
        arrived = [self._norms[p] for p in self._parameters if p in self._norms]
        self._norms.clear()
        norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(arrived))
        return norm

    def _refuse_second_pass_not_finite(self) -> None:
        """Raise TrainingDivergedError if a gradient of the second run is not finite.

        Kernels that add in a different order each time can overflow in the second run alone.
        """
        if bool(torch.isfinite(self._norm_of_all())):
            return
        step, kept = self._state.step + 1, self._state.checkpoint
        raise TrainingDivergedError(
            f"The gradient is not finite in the second backward pass of step {step}: the weights "
            "are lost. Set mixed_precision=no or memory_plan=8bit_adamw_checkpointing."
            + (f" The last good checkpoint is {kept}." if kept else ""),
            step=step,
        )

    @contextmanager
    def _gradient_hooks(self, call: Callable[[nn.Parameter], None]) -> Iterator[None]:
        self._scale = self._precision.loss_scale
        hooks = [
            parameter.register_post_accumulate_grad_hook(call) for parameter in self._parameters
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
