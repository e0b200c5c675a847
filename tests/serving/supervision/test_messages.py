from __future__ import annotations

import pytest

from dreambooth.errors import ModelArtifactError, RequestError, ResourceError, UnavailableError
from dreambooth.serving.supervision.messages import EngineFaultError, Fault


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
