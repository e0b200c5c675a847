"""Captures calls as CUDA graphs that are replayed in one launch; only this module needs a GPU.

As of 2026-11-30 it has not been measured on one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

_WARM_UP_CALLS = 2  # libraries create handles and choose kernels in the first call


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CapturedCall:
    """A captured call: replay() does its work once more, then `output` holds the result."""

    replay: Callable[[], None]
    output: Tensor


class GraphCapturer(Protocol):
    """Captures calls on tensors that keep their addresses."""

    def capture(
        self, call: Callable[[], Tensor], prepare: Callable[[], None] | None = None
    ) -> CapturedCall:
        """Capture what call() does. Its inputs must stay alive and keep their addresses.

        prepare: frees what an earlier call left behind; runs before each call, never captured.
        """

    def pool_bytes(self) -> int:
        """Return the bytes that the captures hold."""

    def free_bytes(self) -> int:
        """Return the bytes that other work could still allocate."""

    def forget(self) -> None:
        """Start a new pool; the caller must have dropped every captured call."""


class CudaGraphCapturer:
    """Captures CUDA graphs that share one memory pool; replay only one of them at a time.

    After a capture that failed no other one is tried in this process: until 2.12 torch's allocator
    then takes the capture for still under way (pull request 180395).
    """

    _has_failed: ClassVar[bool] = False

    def __init__(self, device: torch.device) -> None:
        """Create a stream for captures on a CUDA device, by default the current one."""
        if device == torch.device("cuda"):  # some of torch.cuda's functions want an index
            device = torch.device("cuda", torch.cuda.current_device())
        self._device = device
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._pool_bytes = 0

    def capture(
        self, call: Callable[[], Tensor], prepare: Callable[[], None] | None = None
    ) -> CapturedCall:
        """See GraphCapturer. Raises what torch raises, and RuntimeError after a failed capture."""
        if CudaGraphCapturer._has_failed:
            raise RuntimeError("an earlier capture has failed in this process")
        prepare = prepare or _nothing
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        # This block restores the current stream even if ending a failed capture raises.
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UP_CALLS):
                prepare()
                call()
            torch.cuda.synchronize(self._device)
            prepare()
            torch.cuda.empty_cache()  # other streams cannot use what this one has cached
            before = torch.cuda.memory_reserved(self._device)
            try:
                with torch.cuda.graph(
                    graph,
                    pool=self._pool,
                    stream=self._stream,
                    capture_error_mode="thread_local",  # other threads may use the device
                ):
                    output = call()
            except BaseException:
                CudaGraphCapturer._has_failed = True
                raise
            self._pool_bytes += torch.cuda.memory_reserved(self._device) - before
        current.wait_stream(self._stream)
        return CapturedCall(replay=graph.replay, output=output)

    def pool_bytes(self) -> int:
        """See GraphCapturer."""
        return self._pool_bytes

    def free_bytes(self) -> int:
        """See GraphCapturer. Adds the device's free memory and the allocator's outside the pool.

        The device's free memory is limited by the fraction that this process may allocate.
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
