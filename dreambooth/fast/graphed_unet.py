"""A U-Net whose calls are CUDA graphs: captured once per shape, then replayed in one launch.

A call of Stable Diffusion's U-Net launches over a thousand kernels, which takes a host longer than
a fast GPU takes to run them. Options switch this on, in serving and in sampling class images, and
nothing else needs it: as of 2026-11-22 nobody has measured it on a GPU.

Memory: all captures share one pool of scratch memory, not much larger than the largest call
needs. Counted tensor by tensor, a call of Stable Diffusion 2.1 at 512 x 512 in half precision
needs 65 MiB per row, decoding a picture 0.4 GiB, and the weights 2.4 GiB; libraries need some work
space besides. `GraphBounds` holds the pool below 3 GiB and one call more, so that all of it stays
inside 13 GiB. What is not captured, or cannot be, is called as ever.

Legend: R rows of a call, C latent channels, h w latent cells, L tokens, D text width.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dreambooth.diffusion.device_memory import free_caches, is_out_of_memory
from dreambooth.fast.cuda_graphs import GraphCapturer

logger = logging.getLogger(__name__)

_GIB = 2**30
_COUNTED_KEYS = 1024

Key = tuple[int, int, int, int]  # R, h, w, L
Inputs = tuple[Tensor, Tensor, Tensor]  # latents, timesteps, encoder_hidden_states


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphBounds:
    """When a call is captured.

    most_graphs: held at once. calls_to_replace: when that many are held, a shape is captured, in
    the place of the one unused for longest, only after so many calls; a capture takes as long
    as a few calls. most_cells: R * h * w of a captured call. pool_bytes: nothing is captured once
    the pool has so many, so that it ends at most the largest call's need above. spare_bytes: must
    be free besides, for decoding pictures.
    """

    most_graphs: int = 32
    calls_to_replace: int = 20
    most_cells: int = 16 * 64 * 64
    pool_bytes: int = 3 * _GIB
    spare_bytes: int = 2 * _GIB


class _Held:
    """One captured call and the inputs that it reads."""

    def __init__(self, unet: Any, capturer: GraphCapturer, inputs: Inputs) -> None:
        latents, timesteps, text = inputs
        # U-Nets embed timesteps as float32: one capture serves whole and broken ones.
        self._inputs = (latents.clone(), timesteps.float().clone(), text.clone())
        self._captured = capturer.capture(lambda: _call(unet, self._inputs))

    def __call__(self, inputs: Inputs) -> Tensor:
        """The U-Net's prediction for inputs of this shape, [R, C, h, w], the caller's to keep."""
        for static, given in zip(self._inputs, inputs, strict=True):
            static.copy_(given)
        self._captured.replay()
        return self._captured.output.clone()


class GraphedUNet(torch.nn.Module):
    """A U-Net for one thread's inference; same calls, same numbers, fewer launches.

    Its weights must stay where they are. What it returns are inference tensors.
    """

    def __init__(
        self, unet: Any, capturer: GraphCapturer, bounds: GraphBounds | None = None
    ) -> None:
        """Capture calls of `unet`, which is on its device and has its dtype, with `capturer`."""
        super().__init__()
        self.unet = unet
        self._capturer = capturer
        self._bounds = bounds or GraphBounds()
        self._held: OrderedDict[Key, _Held] = OrderedDict()
        self._calls: Counter[Key] = Counter()  # of shapes that wait for a place
        self._stopped = False
        self._warned_of_memory = False

    @property
    def dtype(self) -> torch.dtype:
        """The U-Net's."""
        dtype: torch.dtype = self.unet.dtype
        return dtype

    @property
    def config(self) -> Any:
        """The U-Net's."""
        return self.unet.config

    @property
    def graphs(self) -> tuple[Key, ...]:
        """The captured shapes (R, h, w, L), the one unused for longest first."""
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
        """As the U-Net's own; captured are calls with timesteps [R] and return_dict=False."""
        inputs = (sample, timestep, encoder_hidden_states)
        if not (return_dict or others or self._stopped) and self._capturable(*inputs):
            output = self._by_graph(inputs)
            if output is not None:
                return (output,)
        if self._held:
            try:
                return self.unet(*inputs, return_dict=return_dict, **others)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            self.release("memory ran out in a call that has none")
        return self.unet(*inputs, return_dict=return_dict, **others)

    def release(self, why: str) -> None:
        """Give back the memory of all graphs; from now on the U-Net is called as ever."""
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
        """The output by a replay; None where there is no graph for it."""
        sample, _, text = inputs
        key = (len(sample), sample.shape[2], sample.shape[3], text.shape[1])
        try:
            held = self._held.get(key)
            if held is None:
                if not self._room_for(key):
                    return None
                held = self._held[key] = _Held(self.unet, self._capturer, inputs)
                if len(self._held) > self._bounds.most_graphs:
                    self._held.popitem(last=False)
            self._held.move_to_end(key)
            return held(inputs)
        except Exception as error:
            # A device that is lost says so again in the call that follows.
            if _any_out_of_memory(error):
                why = f"memory ran out with {len(self._held)} of them"
            else:
                why = f"a call of {key[0]} row(s) failed ({type(error).__name__}: {error})"
        # Outside of `except`, which holds the tensors of the frames that failed.
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


def _any_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what it came out of, says so: ending a failed capture fails as well."""
    while error is not None:
        if is_out_of_memory(error):
            return True
        error = error.__cause__ or error.__context__
    return False
