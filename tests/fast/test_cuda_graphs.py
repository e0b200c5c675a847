from __future__ import annotations

import pytest
import torch

from dreambooth.fast.cuda_graphs import CudaGraphCapturer

GIB = 2**30


@pytest.mark.parametrize(
    ("fraction", "free"),
    [(1.0, 50 + 2), (0.2, 16 - 10 + 2), (0.1, 0 + 2)],
    ids=["the whole GPU", "capped", "cap reached"],
)
def test_what_is_free_is_what_this_process_may_still_take(
    monkeypatch: pytest.MonkeyPatch, fraction: float, free: int
) -> None:
    """Of 80 GiB, 50 are free; torch has reserved 10, of which 8 are in use."""
    for name, value in (
        *(("Stream", None), ("graph_pool_handle", None), ("mem_get_info", (50 * GIB, 80 * GIB))),
        *(("memory_reserved", 10 * GIB), ("memory_allocated", 8 * GIB)),
        ("get_per_process_memory_fraction", fraction),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    assert CudaGraphCapturer(torch.device("cuda")).free_bytes() == free * GIB
