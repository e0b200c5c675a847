"""A micro-batch's forward and backward pass as one captured call: one launch instead of thousands.

Everything that the call reads is copied to where the captured one read it; gradients and losses
arrive where they arrived then. A GPU is needed by `cuda_graphs.CudaGraphCapturer` alone, and nobody
has measured it on one.

Legend: B pictures of a micro-batch, C latent channels, h w latent cells, L tokens, D text width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from dreambooth.fast.cuda_graphs import CapturedCall
from dreambooth.training import out_of_memory

log = logging.getLogger(__name__)

# (noisy_latents [B,C,h,w], timesteps [B], text [B,L,D], target [B,C,h,w]) -> losses [3]; leaves
# gradients with the weights.
OnePass = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
# As CudaGraphCapturer.capture: (call, what is done before each call) -> the captured call.
Capture = Callable[[Callable[[], Tensor], Callable[[], None]], CapturedCall]


def without_capture(call: Callable[[], Tensor], prepare: Callable[[], None]) -> CapturedCall:
    """Return a captured call for any device: a replay is the call once more."""
    prepare()
    output = call().clone()

    def replay() -> None:
        prepare()
        output.copy_(call())

    return CapturedCall(replay=replay, output=output)


class GraphedPasses:
    """A OnePass that is captured in its first call and replayed in all; shapes never change.

    Its gradients are those of the last call alone: they stay where they are, nothing adds up.
    """

    def __init__(
        self, one_pass: OnePass, weights: Sequence[nn.Parameter], capture: Capture
    ) -> None:
        """weights: all that get gradients."""
        self._one_pass, self._weights, self._capture = one_pass, weights, capture
        self._inputs: tuple[Tensor, ...] = ()
        self._captured: CapturedCall | None = None

    def __call__(
        self, noisy_latents: Tensor, timesteps: Tensor, text: Tensor, target: Tensor
    ) -> Tensor:
        """As OnePass; the losses are the caller's to keep."""
        given = (noisy_latents, timesteps, text, target)
        if self._captured is None:
            self._inputs = tuple(tensor.clone() for tensor in given)
            self._captured = self._make_capture()
        for static, tensor in zip(self._inputs, given, strict=True):
            static.copy_(tensor)
        self._captured.replay()
        return self._captured.output.clone()

    def _make_capture(self) -> CapturedCall:
        """Capture the call, or keep calling it where that fails; lack of memory is raised."""
        try:
            return self._capture(self._call, self._drop_gradients)
        except RuntimeError as error:
            if out_of_memory.is_meant_by(error):
                raise
            log.warning(
                "The passes of a step cannot be captured as a CUDA graph (%s: %s): they are "
                "launched one by one.",
                type(error).__name__,
                " ".join(str(error).split()),
            )
        self._capture = without_capture
        return without_capture(self._call, self._drop_gradients)

    def _call(self) -> Tensor:
        noisy_latents, timesteps, text, target = self._inputs
        return self._one_pass(noisy_latents, timesteps, text, target)

    def _drop_gradients(self) -> None:
        """Let go of all gradients, so that the call writes some instead of adding to them."""
        for weight in self._weights:
            weight.grad = None
