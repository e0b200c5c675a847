"""A micro-batch's forward and backward pass as one recorded call: one launch instead of thousands.

Everything that the call reads is copied to where the recorded one read it; gradients and losses
arrive where they arrived then. A GPU is needed by `diffusion.cuda_graphs.CudaRecorder` alone, and
nobody has measured it on one.

Legend: B pictures of a micro-batch, C latent channels, h w latent cells, L tokens, D text width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from dreambooth.diffusion.cuda_graphs import Recording
from dreambooth.training import out_of_memory

log = logging.getLogger(__name__)

# (noisy_latents [B,C,h,w], timesteps [B], text [B,L,D], target [B,C,h,w]) -> losses [3]; leaves
# gradients with the weights.
OnePass = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
# As CudaRecorder.record: (call, what is done before each call) -> its recording.
Record = Callable[[Callable[[], Tensor], Callable[[], None]], Recording]


def by_calling(call: Callable[[], Tensor], prepare: Callable[[], None]) -> Recording:
    """A recording for any device: a replay is the call once more."""
    prepare()
    output = call().clone()

    def replay() -> None:
        prepare()
        output.copy_(call())

    return Recording(replay=replay, output=output)


class GraphedPasses:
    """A OnePass that is recorded in its first call and replayed in all; shapes never change.

    Its gradients are those of the last call alone: they stay where they are, nothing adds up.
    """

    def __init__(self, one_pass: OnePass, weights: Sequence[nn.Parameter], record: Record) -> None:
        """weights: all that get gradients."""
        self._one_pass, self._weights, self._record = one_pass, weights, record
        self._inputs: tuple[Tensor, ...] = ()
        self._recording: Recording | None = None

    def __call__(
        self, noisy_latents: Tensor, timesteps: Tensor, text: Tensor, target: Tensor
    ) -> Tensor:
        """As OnePass; the losses are the caller's to keep."""
        given = (noisy_latents, timesteps, text, target)
        if self._recording is None:
            self._inputs = tuple(tensor.clone() for tensor in given)
            self._recording = self._recorded()
        for static, tensor in zip(self._inputs, given, strict=True):
            static.copy_(tensor)
        self._recording.replay()
        return self._recording.output.clone()

    def _recorded(self) -> Recording:
        """By calling where recording fails; running out of memory is for others to handle."""
        try:
            return self._record(self._call, self._drop_gradients)
        except RuntimeError as error:
            if out_of_memory.is_meant_by(error):
                raise
            log.warning(
                "The passes of a step cannot be recorded as a CUDA graph (%s: %s): they are "
                "launched one by one.",
                type(error).__name__,
                " ".join(str(error).split()),
            )
        self._record = by_calling
        return by_calling(self._call, self._drop_gradients)

    def _call(self) -> Tensor:
        noisy_latents, timesteps, text, target = self._inputs
        return self._one_pass(noisy_latents, timesteps, text, target)

    def _drop_gradients(self) -> None:
        """So that the call writes gradients instead of adding to some."""
        for weight in self._weights:
            weight.grad = None
