from __future__ import annotations

import json

import pytest

from dreambooth.errors import (
    DatasetError,
    ModelArtifactError,
    RequestError,
    ResourceError,
    TrainingDivergedError,
    UnavailableError,
    UserError,
)
from dreambooth.serving.contract import error_reply


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (RequestError("x"), 400, "RequestError"),
        (RequestError("x", 415), 415, "RequestError"),
        (ResourceError("x"), 507, "ResourceError"),
        (UnavailableError("x", 3), 503, "UnavailableError"),
    ],
)
def test_a_named_error_is_reported_with_its_status(
    error: Exception, status: int, kind: str
) -> None:
    told = json.loads(error_reply.of(error).body("abc"))
    assert (told["code"], told["type"], told["message"]) == (status, kind, "x")
    assert told["error"] == told["message"], "the hub's client shows only this key"
    assert told["request_id"] == "abc"
    assert ("retry_after_s" in told) == (status == 503)


@pytest.mark.parametrize(
    "error",
    [
        KeyError("place"),
        TrainingDivergedError("place", 3),
        *(kind("place") for kind in (UserError, ModelArtifactError, DatasetError)),
    ],
)
def test_what_no_client_can_mend_is_an_internal_error(error: Exception) -> None:
    body = error_reply.of(error).body("abc")
    assert json.loads(body)["message"] == "internal error"
    assert b"place" not in body


def test_a_message_with_any_character_makes_valid_ascii() -> None:
    body = error_reply.of(RequestError('ü \ud800 \x00 "quoted"')).body("abc")
    assert json.loads(body.decode("ascii"))["message"] == 'ü \\ud800 \\x00 "quoted"'


def test_request_ids_are_short_and_differ() -> None:
    ids = {error_reply.new_request_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert {len(one) for one in ids} == {12}
