"""A U-Net whose calls are CUDA graphs: captured once per shape, then replayed in one launch.

A call of Stable Diffusion's U-Net launches over a thousand kernels, which takes a host longer than
a fast GPU takes to run them. Options switch it on in serving and in sampling class images. As of
2026-11-22 it has not been measured on a GPU.

Memory: all captures share one pool of scratch memory, not much larger than the largest call
needs. Counted tensor by tensor, a call of Stable Diffusion 2.1 at 512 x 512 in half precision
needs 65 MiB per row, decoding a picture 0.4 GiB, and the weights 2.4 GiB; libraries need some
workspace besides. `GraphBounds` limits the pool to 3 GiB plus the need of one call, so that
everything fits into 13 GiB. Calls that are not or cannot be captured run without a graph.

Legend: R rows of a call, C latent channels, h w latent cells, L tokens, D text width.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dreambooth.diffusion.device_memory import free_caches
from dreambooth.fast.cuda_graphs import GraphCapturer
from dreambooth.process.memory import is_out_of_memory

logger = logging.getLogger(__name__)

_GIB = 2**30
_COUNTED_KEYS = 1024

Key = tuple[int, int, int, int]  # R, h, w, L
Inputs = tuple[Tensor, Tensor, Tensor]  # latents, timesteps, encoder_hidden_states


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphBounds:
    """The limits within which calls are captured.

    most_graphs: held at once, at most. calls_to_replace: once that many graphs are held, a new
    shape replaces the least recently used one only at this many calls, because a capture takes as
    long as a few calls. most_cells: R * h * w of a captured call, at most. pool_bytes: nothing is
    captured once the pool holds this many, so it exceeds them by the largest call's need at most.
    spare_bytes: must be free besides, for decoding pictures.
    """

    most_graphs: int = 32
    calls_to_replace: int = 20
    most_cells: int = 16 * 64 * 64
    pool_bytes: int = 3 * _GIB
    spare_bytes: int = 2 * _GIB


class _GraphedCall:
    """One captured call and the inputs that it reads."""

    def __init__(self, unet: Any, capturer: GraphCapturer, inputs: Inputs) -> None:
        latents, timesteps, text = inputs
        # U-Nets embed timesteps as float32, so one capture serves integers and fractions.
        self._inputs = (latents.clone(), timesteps.float().clone(), text.clone())
        self._captured = capturer.capture(lambda: _call(unet, self._inputs))

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return a copy of the U-Net's prediction [R, C, h, w] for inputs of this shape."""
        for static, given in zip(self._inputs, inputs, strict=True):
            static.copy_(given)
        self._captured.replay()
        return self._captured.output.clone()


class GraphedUNet(torch.nn.Module):
    """A U-Net for inference in one thread: the same calls and numbers with fewer launches.

    Its weights must keep their addresses. It returns inference tensors.
    """

    def __init__(
        self, unet: Any, capturer: GraphCapturer, bounds: GraphBounds | None = None
    ) -> None:
        """Take a U-Net with its final device and dtype, and what captures its calls."""
        super().__init__()
        self.unet = unet
        self._capturer = capturer
        self._bounds = bounds or GraphBounds()
        self._held: OrderedDict[Key, _GraphedCall] = OrderedDict()
        self._calls: Counter[Key] = Counter()  # of shapes that may replace a graph
        self._stopped = False
        self._warned_of_memory = False

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the U-Net."""
        dtype: torch.dtype = self.unet.dtype
        return dtype

    @property
    def config(self) -> Any:
        """Return the configuration of the U-Net."""
        return self.unet.config

    @property
    def graphs(self) -> tuple[Key, ...]:
        """Return the captured shapes (R, h, w, L), the least recently used first."""
        return tuple(self._held)

    @torch.inference_mode()
    def forward(
        self,
        sample: Tensor,
        timestep: Any,
        encoder_hidden_states: Tensor,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        """Call the U-Net; only calls with timesteps [R] and return_dict=False are captured."""
        inputs = (sample, timestep, encoder_hidden_states)
        if not (return_dict or others or self._stopped) and self._capturable(*inputs):
            output = self._by_graph(inputs)
            if output is not None:
                return (output,)
        if self._held:
            try:
                return self.unet(*inputs, return_dict=return_dict, **others)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            self.release("memory ran out in a call that has none")
        return self.unet(*inputs, return_dict=return_dict, **others)

    def release(self, why: str) -> None:
        """Free the memory of all graphs; from now on the U-Net is called without them."""
        if self._stopped:
            return
        logger.warning("The U-Net is called without CUDA graphs from now on: %s.", why)
        self._stopped = True
        self._held.clear()
        self._capturer.forget()
        free_caches()

    def _capturable(self, sample: Tensor, timestep: Any, text: Tensor) -> bool:
        return (
            isinstance(timestep, Tensor)
            and timestep.shape == sample.shape[:1] == text.shape[:1]
            and sample.dtype == text.dtype == self.dtype
            and sample.numel() // sample.shape[1] <= self._bounds.most_cells
        )

    def _by_graph(self, inputs: Inputs) -> Tensor | None:
        """Return the output of a replay; None if there is no graph for these inputs."""
        sample, _, text = inputs
        key = (len(sample), sample.shape[2], sample.shape[3], text.shape[1])
        try:
            held = self._held.get(key)
            if held is None:
                if not self._room_for(key):
                    return None
                held = self._held[key] = _GraphedCall(self.unet, self._capturer, inputs)
                if len(self._held) > self._bounds.most_graphs:
                    self._held.popitem(last=False)
            self._held.move_to_end(key)
            return held(inputs)
        except Exception as error:  # graphs are an extra: without them the call is made anyway
            # If the device is lost, the plain call that follows raises the error again.
            if is_out_of_memory(error):
                why = f"memory ran out with {len(self._held)} of them"
            else:
                why = f"a call of {key[0]} row(s) failed ({type(error).__name__}: {error})"
        # Outside of `except`, because the error keeps the failed frames' tensors alive.
        del held
        self.release(why)
        return None

    def _room_for(self, key: Key) -> bool:
        bounds = self._bounds
        if len(self._held) >= bounds.most_graphs:
            if len(self._calls) >= _COUNTED_KEYS:
                self._calls.clear()
            self._calls[key] += 1
            if self._calls[key] < bounds.calls_to_replace:
                return False
        full = self._capturer.pool_bytes() >= bounds.pool_bytes
        if full or self._capturer.free_bytes() < bounds.spare_bytes:
            if not self._warned_of_memory:
                self._warned_of_memory = True
                logger.warning(
                    "Memory for CUDA graphs is used up with %d of them: calls of other shapes "
                    "are made without.",
                    len(self._held),
                )
            return False
        del self._calls[key]
        return True


def _call(unet: Any, inputs: Inputs) -> Tensor:
    latents, timesteps, text = inputs
    output: Tensor = unet(latents, timesteps, encoder_hidden_states=text, return_dict=False)[0]
    return output
