"""A stand-in for CUDA graphs on any device, and calls of a small U-Net to capture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dreambooth.fast.cuda_graphs import CapturedCall

TOKENS, WIDTH = 32, 32


class Recalls:
    """A capturer for any device: a replay makes the call again, on the captured tensors."""

    def __init__(self) -> None:
        self.free, self.held = 1 << 40, 0
        self.captured, self.replayed, self.forgotten = 0, 0, 0
        self.fault: Callable[[], BaseException] | None = None

    def capture(self, call: Callable[[], Tensor]) -> CapturedCall:
        if self.fault is not None:
            raise self.fault()
        self.captured += 1
        # As in a real capture, nothing is computed before the first replay.
        output = torch.full_like(call(), torch.nan)

        def replay() -> None:
            self.replayed += 1
            output.copy_(call())

        return CapturedCall(replay=replay, output=output)

    def pool_bytes(self) -> int:
        return self.held

    def free_bytes(self) -> int:
        return self.free

    def forget(self) -> None:
        self.forgotten += 1


def inputs(rows: int, *, cells: int = 16, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, 4, cells, cells, generator=draw),
        torch.randint(0, 1000, (rows,), generator=draw),
        torch.randn(rows, TOKENS, WIDTH, generator=draw),
    )


def call(unet: Any, given: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    latents, timesteps, text = given
    with torch.inference_mode():
        output: Tensor = unet(latents, timesteps, encoder_hidden_states=text, return_dict=False)[0]
    return output
