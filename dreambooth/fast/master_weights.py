"""Half-precision weights for the passes; the optimizer updates the fp32 master weights.

Without autocast's casts a pass has about half the launches and half the traffic of activations
(NVIDIA's MLPerf submission trains Stable Diffusion this way). Half weights are used inside a step
only; checkpoints, sample pictures and the exported model are made from the masters.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import nn

from dreambooth.training.freed_gradients import Passes
from dreambooth.training.optimizer import clip_factor, part_by_part
from dreambooth.training.state import TrainingState

# Weights that have fp32 gradients at the same time: 256 MiB.
PART_ELEMENTS = 2**26

Pair = tuple[nn.Parameter, nn.Parameter]  # a master and its half weight


class MasterWeights:
    """A half-precision copy of the U-Net, whose gradients update the fp32 masters.

    Each step calls collect, norm, update. Only update waits for the device, and only if fp16 scales
    the loss.
    """

    def __init__(
        self, state: TrainingState, max_grad_norm: float, *, part_elements: int = PART_ELEMENTS
    ) -> None:
        """Make the half copy, `self.unet`, laid out as the masters are: copies need no strides."""
        self._state, self._precision = state, state.precision
        self._max_norm = max_grad_norm
        self._norm = torch.zeros(())
        half_of = {
            weight: nn.Parameter(weight.detach().to(state.precision.dtype, copy=True))
            for weight in state.unet.parameters()
        }
        self.unet: nn.Module = copy.deepcopy(state.unet, {id(m): h for m, h in half_of.items()})
        self._parts = list(_parts(state.optimizer, half_of, part_elements))
        self._halves = [half for part in self._parts for _, half in part]

    def collect(self, passes: Passes) -> torch.Tensor:
        """Run the passes of a step, which set the half weights' gradients; return their losses."""
        return passes()

    @torch.no_grad()
    def norm(self) -> torch.Tensor:
        """Return the L2 norm of all half gradients together, before clipping, summed in fp32."""
        gradients = [_gradient(half) for half in self._halves]
        norms = torch._foreach_norm(gradients, 2.0, dtype=torch.float32)
        self._norm = torch.linalg.vector_norm(torch.stack(norms)) / self._precision.loss_scale
        return self._norm

    @torch.no_grad()
    def update(self, passes: Passes) -> bool:
        """Update the masters with clipped gradients, then the half weights from the masters.

        Return False, without an update, if fp16 gradients overflowed.
        """
        scaled = self._precision.scaler.is_enabled()
        if not scaled or bool(torch.isfinite(self._norm)):
            # Unscales and clips at once; it has one dimension, so that the product is in fp32.
            factor = clip_factor(self._norm, self._max_norm).div(self._precision.loss_scale)[None]
            with part_by_part(self._state.optimizer) as step:
                for part in self._parts:
                    masters = [master for master, _ in part]
                    halves: list[torch.Tensor] = [half for _, half in part]
                    for master, half in part:
                        master.grad = torch.empty_like(master)
                        torch.mul(_gradient(half), factor, out=master.grad)
                    step(masters)
                    for master in masters:
                        master.grad = None
                    torch._foreach_copy_(halves, list(masters))
        return self._precision.adapt_scale(self._norm)


def _parts(
    optimizer: torch.optim.Optimizer, half_of: dict[nn.Parameter, nn.Parameter], elements: int
) -> Iterator[list[Pair]]:
    """Yield all weights in the optimizer's order, in parts of `elements` at most, or one weight."""
    for group in optimizer.param_groups:
        part: list[Pair] = []
        for master in group["params"]:
            if part and sum(m.numel() for m, _ in part) + master.numel() > elements:
                yield part
                part = []
            part.append((master, half_of[master]))
        if part:
            yield part


def _gradient(half: nn.Parameter) -> torch.Tensor:
    assert half.grad is not None  # every weight of the U-Net takes part
    return half.grad
