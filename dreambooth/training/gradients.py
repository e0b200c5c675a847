"""From gradients to an update: clipped by their global norm, then AdamW.

Kept: all gradients of a step stand beside each other (3.2 GiB for Stable Diffusion).
Freed: each is used and freed the moment it arrives. The factor that clips all of them is known only
after the last one, so the passes of a step are run twice: once for the norm, once for the update.
Clipping is as exact as with kept ones; the price is a second forward and backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn

from dreambooth.errors import TrainingDivergedError
from dreambooth.training.plan import TrainingPlan
from dreambooth.training.state import TrainingState

# Forward and backward passes of one step: leaves gradients, returns what is reported of the losses.
Passes = Callable[[], torch.Tensor]


class Gradients(Protocol):
    """In each step: collect, norm, update."""

    def collect(self, passes: Passes) -> torch.Tensor:
        """Run the passes of a step for its gradients; returns what they return."""

    def norm(self) -> torch.Tensor:
        """L2 norm of all gradients together, before clipping: a scalar on the device."""

    def update(self, passes: Passes) -> bool:
        """Clip, update the weights; False, and no update, where fp16 gradients overflowed."""


class KeptGradients:
    """The plain way."""

    def __init__(self, state: TrainingState, max_grad_norm: float) -> None:
        self._optimizer, self._precision = state.optimizer, state.precision
        self._parameters = _parameters(state.optimizer)
        self._max_norm = max_grad_norm
        self._norm = torch.zeros(())

    def collect(self, passes: Passes) -> torch.Tensor:
        """Run the passes of a step for its gradients; returns what they return."""
        return passes()

    def norm(self) -> torch.Tensor:
        """L2 norm of all gradients together, before clipping."""
        self._precision.unscale(self._optimizer)
        arrived = [p.grad for p in self._parameters if p.grad is not None]
        self._norm = nn.utils.get_total_norm(arrived)
        return self._norm

    def update(self, passes: Passes) -> bool:
        """Clip, update the weights, free the gradients; False where fp16 gradients overflowed."""
        if clip_factor(self._norm, self._max_norm) < 1:  # multiplying by 1 would change nothing
            nn.utils.clip_grads_with_norm_(self._parameters, self._max_norm, self._norm)
        updated = self._precision.step(self._optimizer)
        self._optimizer.zero_grad(set_to_none=True)
        return updated


class FreedGradients:
    """The same in the memory of one layer's gradients."""

    def __init__(self, state: TrainingState, max_grad_norm: float) -> None:
        self._state, self._precision = state, state.precision
        self._parameters = _parameters(state.optimizer)
        self._max_norm = max_grad_norm
        self._scale = 1.0  # of the loss in this pass: asking the scaler waits for the device
        self._norms: dict[nn.Parameter, torch.Tensor] = {}
        self._norm = torch.zeros(())

    def collect(self, passes: Passes) -> torch.Tensor:
        """Run the passes of a step, noting each gradient's norm; returns what they return."""

        def free(parameter: nn.Parameter) -> None:
            self._measure(parameter)
            parameter.grad = None

        with self._as_each_arrives(free):
            return passes()

    def norm(self) -> torch.Tensor:
        """L2 norm of all gradients together, before clipping."""
        self._norm = self._norm_of_all()
        return self._norm

    def update(self, passes: Passes) -> bool:
        """Run the passes again, each weight updated by its clipped gradient as that arrives.

        False, and no update, where fp16 gradients overflowed. Raises TrainingDivergedError.
        """
        if bool(torch.isfinite(self._norm)):
            factor = clip_factor(self._norm, self._max_norm)
            with part_by_part(self._state.optimizer) as step:

                def apply(parameter: nn.Parameter) -> None:
                    self._measure(parameter).mul_(factor)
                    step([parameter])
                    parameter.grad = None

                with self._as_each_arrives(apply):
                    passes()
            self._refuse_what_the_norm_did_not_see()
        return self._precision.adapt_scale(self._norm)

    def _measure(self, parameter: nn.Parameter) -> torch.Tensor:
        """Unscale the gradient that has arrived, note its norm."""
        gradient = parameter.grad
        assert gradient is not None
        if self._scale != 1:
            gradient.mul_(1 / self._scale)
        self._norms[parameter] = torch.linalg.vector_norm(gradient)
        return gradient

    def _norm_of_all(self) -> torch.Tensor:
        """In the parameters' own order, whatever the order of arrival: the same last bits."""
        arrived = [self._norms[p] for p in self._parameters if p in self._norms]
        self._norms.clear()
        norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(arrived))
        return norm

    def _refuse_what_the_norm_did_not_see(self) -> None:
        """Kernels that add in another order each time can overflow in the second pass alone."""
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
    def _as_each_arrives(self, call: Callable[[nn.Parameter], None]) -> Iterator[None]:
        self._scale = self._precision.loss_scale
        hooks = [
            parameter.register_post_accumulate_grad_hook(call)  # type: ignore[no-untyped-call]
            for parameter in self._parameters
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def of(plan: TrainingPlan, state: TrainingState, max_grad_norm: float) -> Gradients:
    """Kept or freed, as the plan says."""
    kind = FreedGradients if plan.frees_gradients else KeptGradients
    return kind(state, max_grad_norm)


@contextmanager
def part_by_part(
    optimizer: torch.optim.Optimizer,
) -> Iterator[Callable[[list[nn.Parameter]], None]]:
    """A call that steps parameters of one group alone; their state stays where all states are."""
    groups = [(group, group["params"]) for group in optimizer.param_groups]
    group_of = {parameter: group for group, members in groups for parameter in members}

    def step(parameters: list[nn.Parameter]) -> None:
        group = group_of[parameters[0]]
        group["params"] = parameters
        optimizer.step()
        group["params"] = []

    try:
        for group, _ in groups:
            group["params"] = []
        yield step
    finally:
        for group, members in groups:
            group["params"] = members


def clip_factor(norm: torch.Tensor, max_norm: float) -> torch.Tensor:
    """As torch's clip_grads_with_norm_ computes it."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
