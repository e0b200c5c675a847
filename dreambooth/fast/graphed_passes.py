"""A micro-batch's forward and backward pass as one captured call: one launch instead of thousands.

Before a replay the inputs are copied into the tensors that the captured call read; gradients and
losses appear in the tensors that it wrote. Only `cuda_graphs.CudaGraphCapturer` needs a GPU, and it
has not been measured on one.

Legend: B pictures of a micro-batch, C latent channels, h w latent cells, L tokens, D text width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from dreambooth.fast.cuda_graphs import CapturedCall
from dreambooth.process.memory import is_out_of_memory

log = logging.getLogger(__name__)

# (noisy_latents [B,C,h,w], timesteps [B], text [B,L,D], target [B,C,h,w]) -> losses [3]; sets
# the gradients of the weights. It takes the other tensors that a MicroBatch has, too, in their
# order, and with several subjects returns losses [3+S].
OnePass = Callable[..., Tensor]
# CudaGraphCapturer.capture or the like: (call, function to run before each call) -> captured call.
Capture = Callable[[Callable[[], Tensor], Callable[[], None]], CapturedCall]


def without_capture(call: Callable[[], Tensor], prepare: Callable[[], None]) -> CapturedCall:
    """Return a CapturedCall for any device; its replay simply calls the function again."""
    prepare()
    output = call().clone()

    def replay() -> None:
        prepare()
        output.copy_(call())

    return CapturedCall(replay=replay, output=output)


class GraphedPasses:
    """A OnePass that is captured at its first call and replayed at every call.

    Shapes must not change. Gradients keep their addresses and are not accumulated over calls.
    """

    def __init__(
        self, one_pass: OnePass, weights: Sequence[nn.Parameter], capture: Capture
    ) -> None:
        """Take a pass to capture. weights: all that get gradients."""
        self._one_pass, self._weights, self._capture = one_pass, weights, capture
        self._inputs: tuple[Tensor, ...] = ()
        self._captured: CapturedCall | None = None

    def __call__(self, *given: Tensor) -> Tensor:
        """Run the pass as OnePass does; return a copy of its losses."""
        if self._captured is None:
            self._inputs = tuple(tensor.clone() for tensor in given)
            self._captured = self._make_capture()
        for static, tensor in zip(self._inputs, given, strict=True):
            static.copy_(tensor)
        self._captured.replay()
        return self._captured.output.clone()

    def _make_capture(self) -> CapturedCall:
        """Capture the call, or fall back to plain calls; errors for lack of memory are raised."""
        try:
            return self._capture(self._call, self._drop_gradients)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            log.warning(
                "The passes of a step cannot be captured as a CUDA graph (%s: %s): they are "
                "launched one by one.",
                type(error).__name__,
                " ".join(str(error).split()),
            )
        return without_capture(self._call, self._drop_gradients)

    def _call(self) -> Tensor:
        return self._one_pass(*self._inputs)

    def _drop_gradients(self) -> None:
        """Drop all gradients, so that the call writes new ones instead of adding to them."""
        for weight in self._weights:
            weight.grad = None
