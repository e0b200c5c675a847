"""Calls captured as CUDA graphs, to be replayed in one launch each: all that needs a GPU for it.

As of 2026-11-23 nobody has measured it on one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_WARM_UP_CALLS = 2  # libraries build their handles and choose their kernels in the first


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CapturedCall:
    """replay() does the captured work once more; then `output` holds its result."""

    replay: Callable[[], None]
    output: Tensor


class GraphCapturer(Protocol):
    """Records calls on tensors that stay where they are."""

    def capture(
        self, call: Callable[[], Tensor], prepare: Callable[[], None] | None = None
    ) -> CapturedCall:
        """Capture what call() does. Its inputs must live on, and keep their addresses.

        prepare: lets go of what an earlier call left behind; made before each call, never captured.
        """

    def pool_bytes(self) -> int:
        """What the captures hold."""

    def free_bytes(self) -> int:
        """What other work could still allocate."""

    def forget(self) -> None:
        """Start a new pool: the caller has let go of every captured."""


class CudaGraphCapturer:
    """Records CUDA graphs that share one memory pool; to be replayed one after another."""

    def __init__(self, device: torch.device) -> None:
        """Take a stream of its own on a CUDA device."""
        self._device = device
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._pool_bytes = 0

    def capture(
        self, call: Callable[[], Tensor], prepare: Callable[[], None] | None = None
    ) -> CapturedCall:
        """See GraphCapturer; whatever torch raises in captured comes out of here."""
        prepare = prepare or _nothing
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        # This block restores the current stream even where ending a failed capture raises.
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UP_CALLS):
                prepare()
                call()
            torch.cuda.synchronize(self._device)
            prepare()
            torch.cuda.empty_cache()  # what the calls left is of use to this stream alone
            before = torch.cuda.memory_reserved(self._device)
            with torch.cuda.graph(
                graph,
                pool=self._pool,
                stream=self._stream,
                capture_error_mode="thread_local",  # other threads may use the device
            ):
                output = call()
            self._pool_bytes += torch.cuda.memory_reserved(self._device) - before
        current.wait_stream(self._stream)
        return CapturedCall(replay=graph.replay, output=output)

    def pool_bytes(self) -> int:
        """See GraphCapturer."""
        return self._pool_bytes

    def free_bytes(self) -> int:
        """See GraphCapturer: the device's free memory, and the allocator's outside of the pool.

        Of the device's no more than the fraction that torch may take for this process.
        """
        free, total = torch.cuda.mem_get_info(self._device)
        reserved = torch.cuda.memory_reserved(self._device)
        allowed = int(torch.cuda.get_per_process_memory_fraction(self._device) * total)
        free = max(0, min(free, allowed - reserved))
        idle = reserved - torch.cuda.memory_allocated(self._device) - self._pool_bytes
        return free + max(0, idle)

    def forget(self) -> None:
        """See GraphCapturer."""
        self._pool = torch.cuda.graph_pool_handle()
        self._pool_bytes = 0


def _nothing() -> None:
    pass
