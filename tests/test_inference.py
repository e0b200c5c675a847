from __future__ import annotations

import base64
import inspect
import io
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import inference
from dreambooth import tiny
from dreambooth.errors import (
    ModelArtifactError,
    RequestError,
    ResourceError,
    UnavailableError,
    UserError,
)

TEXT = "application/x-text"
JSON = "application/json"
STEPS = 2
# Allowed difference of a picture drawn beside others, in steps of 1/255.
TOLERANCE = 2


@pytest.fixture(scope="module")
def model() -> Iterator[inference.Model]:
    model = inference.model_fn(str(tiny.WEIGHTS))
    yield model
    model.engine.close(drain=True)


def answer(model: inference.Model, body: object, content_type: str, accept: str) -> tuple[Any, str]:
    """Run input_fn, predict_fn and output_fn; return the reply (parsed if JSON) and its type."""
    content = body if isinstance(body, (str, bytes, bytearray)) else json.dumps(body).encode()
    data = inference.input_fn(content, content_type)
    reply = inference.output_fn(inference.predict_fn(data, model), accept)
    assert isinstance(reply, tuple)
    encoded, kind = reply
    return (json.loads(encoded) if kind.startswith(JSON) else encoded), kind


def asked(**more: object) -> dict[str, object]:
    return {"prompt": "a photo of a cat", "num_inference_steps": STEPS, "seed": 1, **more}


def pixels(encoded: str | bytes) -> np.ndarray:
    file = base64.b64decode(encoded) if isinstance(encoded, str) else encoded
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("model_fn", ["model_dir"]),
        ("input_fn", ["request_body", "content_type"]),
        ("predict_fn", ["data", "model"]),
        ("output_fn", ["prediction", "accept"]),
    ],
)
def test_the_toolkits_find_the_functions_as_they_call_them(name: str, arguments: list[str]) -> None:
    assert list(inspect.signature(getattr(inference, name)).parameters) == arguments


def test_there_is_no_transform_fn() -> None:
    assert not hasattr(inference, "transform_fn")  # the toolkits take it or the other three


def test_text_gives_one_picture_of_numbers(model: inference.Model) -> None:
    reply, kind = answer(model, "a photo of a cat", TEXT, JSON)
    assert kind == JSON
    assert reply["prompt"] == "a photo of a cat"
    numbers = np.array(reply["generated_image"])
    assert numbers.shape == (64, 64, 3)
    assert numbers.dtype.kind == "i"
    assert 0 <= numbers.min() < numbers.max() <= 255


@pytest.mark.parametrize(
    ("body", "accept"),
    [(bytearray(b"a cat"), "application/json;jpeg"), ('"a cat"', "application/json;png")],
)
def test_text_gives_one_encoded_picture(
    model: inference.Model, body: bytearray | str, accept: str
) -> None:
    reply, kind = answer(model, body, TEXT, accept)
    assert kind == accept
    assert reply["prompt"] == (body if isinstance(body, str) else body.decode())
    assert pixels(reply["generated_image"]).shape == (64, 64, 3)


@pytest.mark.parametrize("content_type", [JSON, "application/json; charset=utf-8"])
def test_json_gives_a_list_of_pictures_in_the_published_order(
    model: inference.Model, content_type: str
) -> None:
    several = asked(prompt=["a cat", "a dog"], num_images_per_prompt=2, width=32, height=48)
    nested, kind = answer(model, several, content_type, JSON)
    assert kind == JSON
    assert nested["prompt"] == ["a cat", "a dog"]
    images = np.array(nested["generated_images"])
    assert images.shape == (4, 48, 32, 3)
    png, _ = answer(model, several, content_type, "application/json;png")
    drawn_again = np.array([pixels(encoded) for encoded in png["generated_images"]])
    assert np.abs(drawn_again - images).max() <= TOLERANCE
    dog = asked(prompt="a dog", width=32, height=48, seed=3)
    alone, _ = answer(model, dog, JSON, JSON)
    assert np.abs(np.array(alone["generated_images"][0]) - images[2]).max() <= TOLERANCE


def test_json_gives_jpegs_as_base64(model: inference.Model) -> None:
    reply, kind = answer(model, asked(), JSON, "application/json;jpeg")
    assert kind == "application/json;jpeg"
    assert isinstance(reply["generated_images"], list)
    assert base64.b64decode(reply["generated_images"][0])[:2] == b"\xff\xd8"


@pytest.mark.parametrize("suffix", ["png", "jpeg", "webp"])
def test_one_picture_may_come_as_it_is(model: inference.Model, suffix: str) -> None:
    reply, kind = answer(model, asked(), JSON, f"image/{suffix}")
    assert kind == f"image/{suffix}"
    assert Image.open(io.BytesIO(reply)).format == suffix.upper()


def test_the_hugging_face_toolkits_form(model: inference.Model) -> None:
    body = {"inputs": "a cat", "parameters": {"num_inference_steps": STEPS, "seed": 1}}
    base64_png, kind = answer(model, body, JSON, "*/*")
    assert kind == JSON
    raw, _ = answer(model, body, JSON, "image/png")
    assert np.array_equal(pixels(base64_png), pixels(raw))


def test_without_a_seed_each_request_has_its_own(model: inference.Model) -> None:
    body = inference.input_fn(json.dumps({"prompt": "a cat", "num_inference_steps": 1}), JSON)
    first, second = (inference.predict_fn(body, model) for _ in range(2))
    assert first.pictures[0].seed != second.pictures[0].seed


def test_many_threads_share_one_model(model: inference.Model) -> None:
    def draw(seed: int) -> np.ndarray:
        reply, _ = answer(model, asked(seed=seed), JSON, "image/png")
        return pixels(reply).astype(int)

    alone = [draw(seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as threads:
        together = list(threads.map(draw, range(6)))
    for one, other in zip(alone, together, strict=True):
        assert np.abs(one - other).max() <= TOLERANCE
    assert np.abs(alone[0] - alone[1]).max() > TOLERANCE


@pytest.mark.parametrize("content_type", ["text/plain", "application/octet-stream", "", None])
def test_other_content_types_are_refused_by_input_fn(content_type: Any) -> None:
    with pytest.raises(RequestError) as caught:
        inference.input_fn(b"a cat", content_type)
    assert caught.value.status == 415


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (asked(width=65), "width must be divisible by 8, got 65."),
        (asked(widht=64), "invalid key widht"),
        ({"width": 64}, "Input payload must contain 'prompt' key."),
        (asked(num_inference_steps=1001), "num_inference_steps"),
        ('{"prompt": NaN}', "NaN"),
        (b"\xff\xfe", "UTF-8"),
        (b"", "empty"),
    ],
)
def test_bad_requests_are_refused_by_predict_fn(
    model: inference.Model, body: object, sentence: str
) -> None:
    with pytest.raises(RequestError, match=sentence) as caught:
        answer(model, body, JSON, JSON)
    assert caught.value.status == 400


def test_what_no_format_could_hold_is_never_drawn(model: inference.Model) -> None:
    before = model.engine.status().pictures_total
    body = inference.input_fn(json.dumps(asked(num_images_per_prompt=60, width=1024)), JSON)
    with pytest.raises(RequestError, match="ask for fewer or smaller pictures"):
        inference.predict_fn(body, replace(model, max_response_bytes=10_000))
    assert model.engine.status().pictures_total == before


def test_an_accept_that_is_not_offered_is_406(model: inference.Model) -> None:
    with pytest.raises(RequestError) as caught:
        answer(model, asked(), JSON, "text/html")
    assert caught.value.status == 406


def test_lists_that_are_too_long_name_the_way_out(model: inference.Model) -> None:
    with pytest.raises(RequestError, match="application/json;jpeg") as caught:
        answer(replace(model, max_response_bytes=20_000), asked(), JSON, JSON)
    assert caught.value.status == 400


def test_the_servers_variables_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMS_MAX_RESPONSE_SIZE", "20000000")
    model = inference.model_fn(str(tiny.WEIGHTS))
    model.engine.close(drain=False)
    assert model.max_response_bytes == 20_000_000
    monkeypatch.setenv("DREAMBOOTH_BATCH_ROWS", "none")
    with pytest.raises(UserError, match="DREAMBOOTH_BATCH_ROWS"):
        inference.model_fn(str(tiny.WEIGHTS))


def test_what_is_no_model_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ModelArtifactError, match=r"model_index\.json"):
        inference.model_fn(str(tmp_path))


class ToolkitError(Exception):
    """Stands in for sagemaker_inference.errors.BaseInferenceToolkitError."""

    def __init__(self, status_code: int, message: str, phrase: str) -> None:
        self.status_code, self.message, self.phrase = status_code, message, phrase


def test_a_toolkit_is_told_of_a_model_that_is_none_without_its_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    toolkit = SimpleNamespace(BaseInferenceToolkitError=ToolkitError)
    monkeypatch.setitem(sys.modules, "sagemaker_inference.errors", toolkit)
    with pytest.raises(ToolkitError) as caught:
        inference.model_fn(str(tmp_path / "none"))
    assert (caught.value.status_code, str(caught.value)) == (500, "internal error")
    assert str(tmp_path / "none") in caplog.text


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RequestError("wrong"), 400),
        (ResourceError("too large"), 507),
        (UnavailableError("busy", 3), 503),
        (ModelArtifactError("/opt/ml/model/unet is damaged"), 500),
        (FileNotFoundError(2, "No such file", "/opt/ml/model/vae"), 500),
        (KeyError("/opt/ml/model"), 500),
    ],
)
def test_a_toolkit_gets_a_status_and_no_path_of_this_machine(
    error: Exception,
    status: int,
    model: inference.Model,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def submit(*_: object, **__: object) -> None:
        raise error

    toolkit = SimpleNamespace(BaseInferenceToolkitError=ToolkitError)
    monkeypatch.setitem(sys.modules, "sagemaker_inference.errors", toolkit)
    monkeypatch.setattr(model.engine, "submit", submit)
    body = inference.input_fn(b"a cat", "application/x-text")
    with pytest.raises(ToolkitError) as caught:
        inference.predict_fn(body, model)
    expected = "internal error" if status == 500 else str(error)
    told = caught.value
    assert (told.status_code, told.message, str(told)) == (status, expected, expected)
    assert told.__cause__ is None
    assert told.__suppress_context__
    assert ("/opt/ml/model" in caplog.text) == (status == 500), "the log says where"
