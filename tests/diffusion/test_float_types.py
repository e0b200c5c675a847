from __future__ import annotations

import pytest
import torch

from dreambooth.diffusion.float_types import dtype_for


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("auto", torch.float32),
        ("fp32", torch.float32),
        ("fp16", torch.float16),
        ("bf16", torch.bfloat16),
    ],
)
def test_on_a_cpu(precision: str, dtype: torch.dtype) -> None:
    assert dtype_for(precision, torch.device("cpu")) is dtype


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)]
)
def test_auto_on_a_gpu_is_the_half_type_that_it_is_fast_in(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert dtype_for("auto", torch.device("cuda")) is dtype
    assert dtype_for("fp32", torch.device("cuda")) is torch.float32


def test_an_unknown_word_is_no_precision() -> None:
    with pytest.raises(KeyError):
        dtype_for("half", torch.device("cpu"))
