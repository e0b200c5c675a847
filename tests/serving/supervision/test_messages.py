from __future__ import annotations

import pytest

from dreambooth.diffusion.sampling_request import SamplingRequest
from dreambooth.errors import ModelArtifactError, RequestError, ResourceError, UnavailableError
from dreambooth.serving.supervision.messages import EngineFaultError, Fault, Generate


@pytest.mark.parametrize(
    "error",
    [
        RequestError("too large", 413),
        ResourceError("no memory"),
        UnavailableError("later", 2.5),
        ModelArtifactError("no model"),
    ],
)
def test_a_named_error_comes_out_as_it_went_in(error: Exception) -> None:
    copy = Fault.of(error).exception()
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    for name in ("status", "retry_after_s"):
        assert getattr(copy, name, None) == getattr(error, name, None)


def test_of_unknown_exceptions_only_the_class_is_reported() -> None:
    fault = Fault.of(KeyError("secret"))
    assert "secret" not in str(fault)
    assert isinstance(fault.exception(), EngineFaultError)


def test_an_error_class_that_nobody_knows_is_a_fault_of_the_engine() -> None:
    assert isinstance(Fault(error="SystemExit", message="x").exception(), EngineFaultError)


def test_pictures_come_back_field_by_field() -> None:
    pictures = (
        SamplingRequest(prompt="a", negative_prompt="b", seed=1, width=8, height=16, eta=0.5),
        SamplingRequest(prompt="b", num_inference_steps=3, guidance_scale=0.1, seed=2**64 - 1),
    )
    message = Generate.of(1, pictures, 2)
    assert message.texts == ("a", "b", "")
    assert message.sampling_requests() == pictures


def test_an_order_beyond_the_table_of_texts_is_an_error() -> None:
    message = Generate.of(1, [SamplingRequest(prompt="a", seed=1)], None)
    with pytest.raises(IndexError):
        Generate(request_id=1, texts=(), orders=message.orders, batch_size=None).sampling_requests()
