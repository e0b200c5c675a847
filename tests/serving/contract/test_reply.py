from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dreambooth.diffusion.sampling_request import SamplingFacts
from dreambooth.errors import RequestError
from dreambooth.limits import LIMITS
from dreambooth.serving.contract import reply
from dreambooth.serving.contract.reply import (
    JPEG,
    JSON_JPEG,
    JSON_PNG,
    NESTED,
    PNG,
    WEBP,
    Picture,
    ReplyFormat,
    encode,
    negotiate,
)
from dreambooth.serving.contract.request import GenerationRequest, parse

FACTS = SamplingFacts(resolution=64, unit=8, max_steps=999)
CAT = 'a photo of a \N{CAT FACE} "cat"'
ROOM = 6_291_456  # bytes of one InvokeEndpoint reply
TEXT = parse("application/x-text", CAT.encode(), FACTS)


def asked(**keys: Any) -> GenerationRequest:
    return parse("application/json", json.dumps({"prompt": CAT} | keys), FACTS)


def huggingface(inputs: object = CAT, **parameters: Any) -> GenerationRequest:
    body = json.dumps({"inputs": inputs, "parameters": parameters})
    return parse("application/json", body, FACTS)


def drawn(request: GenerationRequest, *, base_seed: int = 7, **change: Any) -> list[Picture]:
    """Return a picture of a soft gradient for each that is asked for, each in another colour."""
    row, column = np.mgrid[0 : request.height, 0 : request.width]
    pictures = []
    for i, wanted in enumerate(request.sampling_requests(base_seed)):
        planes = (row * 3 % 256, column * 3 % 256, np.full_like(row, i * 40))
        pixels = np.ascontiguousarray(np.stack(planes, axis=-1).astype(np.uint8))
        pictures.append(Picture(pixels=pixels, seed=wanted.seed, finish_reason="SUCCESS", **change))
    return pictures


def opened(file: bytes, kind: str) -> np.ndarray:
    image = Image.open(io.BytesIO(file))
    assert (image.format, image.mode) == (kind, "RGB")
    return np.asarray(image)


def close(found: np.ndarray, picture: Picture) -> bool:
    return float(np.abs(found.astype(int) - picture.pixels.astype(int)).mean()) < 4.0


def body_of(request: GenerationRequest, pictures: Sequence[Picture], format: ReplyFormat) -> Any:
    content, media_type = encode(request, pictures, format)
    assert media_type == format.media_type
    return json.loads(content)


# Formats.


def test_a_text_request_gets_one_picture() -> None:
    pictures = drawn(TEXT)
    body = body_of(TEXT, pictures, NESTED)
    assert list(body) == ["generated_image", "prompt", "seeds", "finish_reasons"]
    assert np.array_equal(np.array(body["generated_image"]), pictures[0].pixels)
    assert (body["prompt"], body["seeds"], body["finish_reasons"]) == (CAT, [7], ["SUCCESS"])
    body = body_of(TEXT, pictures, JSON_JPEG)
    assert list(body) == ["generated_image", "prompt", "seeds", "finish_reasons"]
    assert close(opened(base64.b64decode(body["generated_image"]), "JPEG"), pictures[0])


def test_a_quoted_text_is_echoed_with_its_quotes() -> None:
    request = parse("application/x-text", b'"a cat"', FACTS)
    assert body_of(request, drawn(request), NESTED)["prompt"] == '"a cat"'


def test_a_json_request_gets_a_list() -> None:
    request = asked(prompt=["x", "y"], num_images_per_prompt=2, width=48, seed=7)
    pictures = drawn(request)
    body = body_of(request, pictures, NESTED)
    assert list(body) == ["generated_images", "prompt", "seeds", "finish_reasons"]
    assert np.array(body["generated_images"]).shape == (4, 64, 48, 3)
    for found, picture in zip(body["generated_images"], pictures, strict=True):
        assert np.array_equal(np.array(found), picture.pixels)
    assert body["prompt"] == ["x", "y"]
    assert body["seeds"] == [7, 8, 9, 10]
    assert body["finish_reasons"] == ["SUCCESS"] * 4


def test_one_picture_of_a_json_request_is_a_list_too() -> None:
    assert len(body_of(asked(), drawn(asked()), JSON_PNG)["generated_images"]) == 1


def test_base64_pictures_are_the_pictures() -> None:
    request = asked(num_images_per_prompt=3)
    pictures = drawn(request)
    for format, kind in ((JSON_PNG, "PNG"), (JSON_JPEG, "JPEG")):
        body = body_of(request, pictures, format)
        for text, picture in zip(body["generated_images"], pictures, strict=True):
            found = opened(base64.b64decode(text, validate=True), kind)
            assert close(found, picture)
            assert kind == "JPEG" or np.array_equal(found, picture.pixels)


def test_raw_pictures_are_files() -> None:
    (picture,) = drawn(asked())
    for format, kind in ((PNG, "PNG"), (JPEG, "JPEG"), (WEBP, "WEBP")):
        content, media_type = encode(asked(), [picture], format)
        assert media_type == format.media_type
        found = opened(content, kind)
        assert close(found, picture)
        assert kind != "PNG" or np.array_equal(found, picture.pixels)


def test_the_hugging_face_form_has_its_own_replies() -> None:
    one, two = huggingface(), huggingface(num_images_per_prompt=2)
    format = negotiate("application/json", one, max_response_bytes=ROOM)
    text = body_of(one, drawn(one), format)
    assert np.array_equal(opened(base64.b64decode(text), "PNG"), drawn(one)[0].pixels)
    texts = body_of(two, drawn(two), format)
    assert [opened(base64.b64decode(text), "PNG").shape for text in texts] == [(64, 64, 3)] * 2
    listed = huggingface(["x"])
    assert len(body_of(listed, drawn(listed), format)) == 1
    text = body_of(one, drawn(one), JSON_JPEG)
    assert close(opened(base64.b64decode(text), "JPEG"), drawn(one)[0])


def test_what_happened_to_each_picture_is_reported() -> None:
    request = asked(num_images_per_prompt=4)
    reasons = ["SUCCESS", "CONTENT_FILTERED", "NOT_FINITE", "BLACK"]
    pictures = [
        replace(picture, finish_reason=reason)
        for picture, reason in zip(drawn(request), reasons, strict=True)
    ]
    assert body_of(request, pictures, JSON_JPEG)["finish_reasons"] == reasons
    assert "exact" not in body_of(request, pictures, JSON_JPEG)


def test_lifted_exactness_is_reported() -> None:
    request = asked(num_images_per_prompt=2)
    pictures = [*drawn(request)[:1], *drawn(request, exact=False)[1:]]
    body = body_of(request, pictures, JSON_JPEG)
    assert body["exact"] is False
    assert list(body)[:2] == ["generated_images", "prompt"]


def test_seeds_wrap() -> None:
    request = asked(num_images_per_prompt=2)
    content, _ = encode(request, drawn(request, base_seed=2**64 - 1), JSON_JPEG)
    assert json.loads(content)["seeds"] == [2**64 - 1, 0]


# Accept.


def chosen(accept: str | None, request: GenerationRequest | None = None, room: int = ROOM) -> str:
    request = asked() if request is None else request
    return negotiate(accept, request, max_response_bytes=room).media_type


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        (None, "application/json"),
        ("", "application/json"),
        ("  ", "application/json"),
        ("*/*", "application/json"),
        ("application/*", "application/json"),
        ("application/json", "application/json"),
        ("Application/JSON", "application/json"),
        ("application/json; charset=utf-8", "application/json"),
        ("application/json;verbose", "application/json"),
        ("application/json;jpeg", "application/json;jpeg"),
        ("application/json; JPEG", "application/json;jpeg"),
        ("application/json;jpeg;verbose", "application/json;jpeg"),
        ("application/json;verbose;jpeg", "application/json;jpeg"),
        ("application/json;png", "application/json;png"),
        ("image/png", "image/png"),
        ("image/jpeg", "image/jpeg"),
        ("image/jpg", "image/jpeg"),
        ("image/webp", "image/webp"),
        ("image/*", "image/png"),
        ("application/json, text/plain", "application/json"),
        ("text/html, image/avif, image/webp, */*;q=0.8", "image/webp"),
        ("image/png;q=0.1, application/json;jpeg;q=0.9", "application/json;jpeg"),
        ("image/png;q=0.5, image/webp;q=0.5", "image/png"),
        ("image/png;q=0, image/webp;q=0.001", "image/webp"),
        ("image/png; Q=x, image/webp", "image/webp"),
        ("text/html, */*;q=0.1", "application/json"),
        # The most specific range decides, q=0 refuses (RFC 9110, section 12.5.1).
        ("application/json;q=0, */*", "image/png"),
        ("*/*, application/json;q=0", "image/png"),
        ("image/*;q=0, */*", "application/json"),
        ("image/png;q=0, image/*", "image/jpeg"),
        ("image/*, image/png;q=0, image/jpeg;q=0", "image/webp"),
        ("*/*;q=0, image/webp", "image/webp"),
        ("image/*;q=0.9, image/png;q=0.1, application/json;q=0.5", "image/jpeg"),
        ("application/*;q=0.2, image/*;q=0.3", "image/png"),
        ("application/json;q=0, application/json;jpeg", "application/json;jpeg"),
        ("application/json;jpeg;q=0, application/*", "application/json"),
        ("application/json;q=0.1, */*;q=0.9", "image/png"),
        ("*/*, image/webp", "image/webp"),
        ("application/*, application/json;png", "application/json;png"),
        ("image/jpg;q=0, image/png;q=0, image/*", "image/webp"),
        ("application/json;verbose;q=0, image/webp;q=0.1, */*;q=0", "image/webp"),
    ],
)
def test_accept_is_tried_by_preference(accept: str | None, media_type: str) -> None:
    assert chosen(accept) == media_type
    assert chosen(accept, TEXT) == media_type


@pytest.mark.parametrize(
    "accept",
    [
        "text/plain",
        "image/gif",
        "application/json;gif",
        "application/json;jpeg;png",
        "image/png;jpeg",
        "*/*;jpeg",
        "application/json;q=0",
        "application/json;q=nan",
        "*/*;q=0",
        "application/json;q=0, application/*",
        "application/*;q=0.0, image/*;q=0",
        "*/*, application/*;q=0, image/*;q=0.000",
        "image/png;q=0, image/jpeg;q=0, image/webp;q=0, image/*",
        ";",
        ",",
        "x" * 10_000,
    ],
)
def test_what_is_not_offered_is_406_and_says_what_is(accept: str) -> None:
    with pytest.raises(RequestError) as error:
        chosen(accept)
    assert error.value.status == 406
    for format in reply.FORMATS:
        assert format.media_type in str(error.value)
    assert len(str(error.value)) < 400


@given(st.text(alphabet='applicton/jsme*;,q=01. vbpg"') | st.text())
def test_any_accept_is_understood_or_406(accept: str) -> None:
    try:
        chosen(accept)
    except RequestError as error:
        told = error
    else:
        return
    assert told.status == 406


ranges = st.tuples(
    st.sampled_from(
        [*(format.media_type for format in reply.FORMATS), "application/*", "image/*", "*/*"]
    ),
    st.sampled_from(["0", "0.0", "0.001", "0.5", "0.7", "1", "1.000"]),
)


@given(st.lists(ranges, min_size=1, max_size=6, unique_by=lambda entry: entry[0]))
def test_no_other_format_is_wanted_more(entries: list[tuple[str, str]]) -> None:
    def quality(media_type: str) -> float:
        kind = media_type.partition(";")[0]
        matching = (media_type, kind, kind.partition("/")[0] + "/*", "*/*")
        return next((float(given[name]) for name in matching if name in given), 0.0)

    given = dict(entries)
    accept = ", ".join(f"{name};q={q}" for name, q in entries)
    best = max(quality(format.media_type) for format in reply.FORMATS)
    if best == 0:
        with pytest.raises(RequestError) as error:
            chosen(accept)
        assert error.value.status == 406
    else:
        assert quality(chosen(accept)) == best


def test_any_range_takes_no_bare_picture_in_place_of_json_that_does_not_fit() -> None:
    wide = asked(width=1024, height=1024)
    with pytest.raises(RequestError, match="nested lists"):
        chosen("application/json, text/plain, */*", wide)
    assert chosen("application/json, */*;q=0.5, application/json;jpeg;q=0.1", wide) == (
        "application/json;jpeg"
    )
    assert chosen("image/webp, */*;q=0.5", asked(num_images_per_prompt=3)) == "application/json"
    assert chosen("image/*, */*;q=0.5", asked(num_images_per_prompt=3)) == "application/json"


def test_the_hugging_face_form_has_no_nested_lists() -> None:
    for accept in (None, "*/*", "application/json"):
        format = negotiate(accept, huggingface(), max_response_bytes=ROOM)
        assert (format.kind, format.codec, format.media_type) == (
            *("base64", "PNG"),
            "application/json",
        )
    assert chosen("image/jpeg", huggingface()) == "image/jpeg"
    assert chosen("application/json;jpeg", huggingface()) == "application/json;jpeg"


def test_several_pictures_are_no_raw_picture() -> None:
    several = asked(num_images_per_prompt=3)
    for accept in ("image/png", "image/jpeg", "image/webp", "image/*"):
        with pytest.raises(RequestError, match="holds one picture, and 3 are asked for") as error:
            chosen(accept, several)
        assert error.value.status == 400
    assert chosen("image/png, application/json;png;q=0.5", several) == "application/json;png"


# The size of a reply.


def test_nested_lists_that_may_not_fit_are_refused_before_any_work() -> None:
    assert chosen(None, asked(width=512, height=512)) == "application/json"
    two = asked(width=512, height=512, num_images_per_prompt=2)
    for accept in (None, "*/*", "application/json"):
        with pytest.raises(RequestError) as error:
            chosen(accept, two)
        assert error.value.status == 400
        for words in ("2 picture(s) of 512 x 512", "application/json;jpeg", "6291456", "7342285"):
            assert words in str(error.value)
    assert chosen("application/json;jpeg", two) == "application/json;jpeg"
    assert chosen("application/json, application/json;png;q=0.1", two) == "application/json;png"


@pytest.mark.parametrize(
    "request_", [TEXT, asked(), asked(prompt=["x" * 40, CAT], num_images_per_prompt=3, width=48)]
)
def test_the_bound_of_nested_lists_is_exact(request_: GenerationRequest) -> None:
    white = np.full((request_.height, request_.width, 3), 255, np.uint8)
    worst = [
        replace(picture, pixels=white, finish_reason="CONTENT_FILTERED", exact=False)
        for picture in drawn(request_, base_seed=2**64 - 9)
    ]
    length = len(encode(request_, worst, NESTED)[0])
    assert chosen(None, request_, length) == "application/json"
    with pytest.raises(RequestError, match=f"take up to {length} bytes"):
        chosen(None, request_, length - 1)


@pytest.mark.parametrize("accept", ["application/json;jpeg", "application/json;png", "image/png"])
def test_pictures_that_cannot_fit_are_refused_and_others_are_not(accept: str) -> None:
    request = asked(width=1024, height=1024)
    grey = np.full((1024, 1024, 3), 128, np.uint8)
    picture = Picture(pixels=grey, seed=0, finish_reason="SUCCESS")
    format = negotiate(accept, request, max_response_bytes=ROOM)
    smallest = len(encode(request, [picture], format)[0])
    assert chosen(accept, request, smallest) == accept  # a picture that fits is not refused
    with pytest.raises(RequestError, match=r"1 picture\(s\) of 1024 x 1024 pixels take at least"):
        chosen(accept, request, 3_000)


@pytest.mark.parametrize("format", [JSON_PNG, JSON_JPEG, PNG, JPEG])
def test_a_body_that_is_too_long_is_refused_with_what_would_fit(format: ReplyFormat) -> None:
    request = asked()
    pictures = drawn(request)
    length = len(encode(request, pictures, format)[0])
    encode(request, pictures, format, max_response_bytes=length)
    with pytest.raises(RequestError, match=f"came to {length} bytes") as error:
        encode(request, pictures, format, max_response_bytes=length - 1)
    assert error.value.status == 400
    assert ("jpeg, ask for fewer" in str(error.value)) == (format.codec == "PNG")


def test_thousands_of_accept_ranges_take_no_longer_than_one() -> None:
    body = json.dumps({"prompt": ["x" * LIMITS.max_prompt_characters] * 64}).encode()
    request = parse("application/json", body, FACTS)
    started = time.perf_counter()
    with pytest.raises(RequestError, match="nested lists"):
        chosen(",".join(["*/*"] * 8_000), request, 1_000)
    # Measured: 0.05 s; checking each entry separately would take 40 s.
    assert time.perf_counter() - started < 2


def test_the_protocol_needs_no_torch() -> None:
    code = (
        "import sys, dreambooth.serving.contract.request, dreambooth.serving.contract.reply, "
        "dreambooth.serving.contract.openapi; "
        "print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[3],
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("side", "count", "format", "quick"),
    [
        (512, 1, JPEG, True),
        (512, 2, JSON_JPEG, False),
        (256, 4, JSON_JPEG, True),
        (520, 1, JPEG, False),
        (64, 1, PNG, False),
        (64, 1, NESTED, False),
    ],
)
def test_only_little_work_is_quick(side: int, count: int, format: ReplyFormat, quick: bool) -> None:
    pixels = np.zeros((side, side, 3), np.uint8)
    pictures = [Picture(pixels=pixels, seed=i, finish_reason="SUCCESS") for i in range(count)]
    assert reply.is_quick(pictures, format) is quick
