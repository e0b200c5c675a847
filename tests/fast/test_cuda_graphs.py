from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dreambooth.diffusion import device_memory
from dreambooth.diffusion.model import DiffusionModel
from dreambooth.fast.cuda_graphs import CudaGraphCapturer
from dreambooth.fast.graphed_passes import GraphedPasses
from dreambooth.fast.graphed_unet import GraphedUNet
from tests.fast.graph_stand_in import call, inputs

GIB = 2**30
DEVICES: list[object] = []  # that torch.cuda was asked about


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Stand in for torch.cuda on GPU 1 of two; return a function that replaces more of it.

    Of 80 GiB, 50 are free; torch has reserved 10, of which 8 are in use.
    """

    def replace(**values: Any) -> None:
        for name, value in values.items():

            def answer(*given: object, value: Any = value, **_: object) -> Any:
                DEVICES.extend(given)
                return value

            monkeypatch.setattr(torch.cuda, name, value if callable(value) else answer)

    replace(
        current_device=1,
        Stream=type("Stream", (), {"__init__": lambda *_: None, "wait_stream": lambda *_: None}),
        current_stream=lambda *_: torch.cuda.Stream(),
        graph_pool_handle=None,
        mem_get_info=(50 * GIB, 80 * GIB),
        memory_reserved=10 * GIB,
        memory_allocated=8 * GIB,
        get_per_process_memory_fraction=1.0,
        synchronize=None,
        empty_cache=None,
        CUDAGraph=None,
        stream=lambda _: contextlib.nullcontext(),
    )
    monkeypatch.setattr(CudaGraphCapturer, "_has_failed", False)
    DEVICES.clear()
    return replace


@pytest.mark.parametrize(
    ("fraction", "free"),
    [(1.0, 50 + 2), (0.2, 16 - 10 + 2), (0.1, 0 + 2)],
    ids=["the whole GPU", "capped", "cap reached"],
)
def test_what_is_free_is_what_this_process_may_still_take(
    gpu: Callable[..., None], fraction: float, free: int
) -> None:
    gpu(get_per_process_memory_fraction=fraction)
    assert CudaGraphCapturer(torch.device("cuda", 0)).free_bytes() == free * GIB
    assert set(DEVICES) == {torch.device("cuda", 0)}


def test_a_device_without_an_index_is_the_current_one(gpu: Callable[..., None]) -> None:
    """Accelerate gives such a device in one process, and torch refuses it for the fraction."""
    CudaGraphCapturer(torch.device("cuda")).free_bytes()
    assert set(DEVICES) == {torch.device("cuda", 1)}


@contextlib.contextmanager
def _fails(*_: object, **__: object) -> Iterator[None]:
    yield
    raise RuntimeError("CUDA error: operation not permitted when stream is capturing")


@contextlib.contextmanager
def _must_not_begin(*_: object, **__: object) -> Iterator[None]:
    raise AssertionError("a second capture")
    yield


def test_after_a_failed_capture_none_is_tried_again_in_the_process(
    gpu: Callable[..., None], loaded_small_model: DiffusionModel, caplog: pytest.LogCaptureFixture
) -> None:
    unet, given = loaded_small_model.unet, inputs(1)
    for graph in (_fails, _must_not_begin):
        gpu(graph=graph)
        graphed = GraphedUNet(unet, CudaGraphCapturer(torch.device("cuda")))
        assert torch.equal(call(graphed, given), call(unet, given))

    def one_pass(*given: Tensor) -> Tensor:
        return given[0].sum()[None]

    capturer = CudaGraphCapturer(torch.device("cuda"))
    run = GraphedPasses(one_pass, [], capturer.capture)
    assert float(run(torch.ones(2), torch.ones(2), torch.ones(2), torch.ones(2))) == 2
    assert caplog.text.count("an earlier capture has failed in this process") == 2


def test_caches_that_torch_cannot_free_after_a_failed_capture_stay(
    gpu: Callable[..., None],
) -> None:
    def asserts(message: str) -> Callable[[], None]:
        def empty_cache() -> None:
            raise RuntimeError(message)

        return empty_cache

    gpu(is_available=True, empty_cache=asserts("captures_underway.empty() INTERNAL ASSERT FAILED"))
    device_memory.free_caches()
    gpu(empty_cache=asserts("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        device_memory.free_caches()
