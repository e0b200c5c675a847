"""Holds the static document against the code: keys, caps, defaults, formats, statuses, examples."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dreambooth import __version__
from dreambooth.diffusion.sampling_request import SamplingFacts
from dreambooth.errors import RequestError
from dreambooth.limits import LIMITS
from dreambooth.model_folder.facts import SMALLEST_UNIT
from dreambooth.serving.contract import openapi, reply, request
from dreambooth.serving.contract.reply import Picture
from dreambooth.serving.http import app

FACTS = SamplingFacts(resolution=512, unit=8, max_steps=999)
RAW = openapi.document()


def resolved(value: Any) -> Any:
    """Return a part of the document with what its references name in their place."""
    if isinstance(value, list):
        return [resolved(item) for item in value]
    if not isinstance(value, dict):
        return value
    found: dict[str, Any] = {}
    if "$ref" in value:
        place: Any = RAW
        for key in value["$ref"].removeprefix("#/").split("/"):
            place = place[key]
        found = resolved(place)
    return found | {key: resolved(item) for key, item in value.items() if key != "$ref"}


DOCUMENT = resolved(RAW)
SCHEMAS = DOCUMENT["components"]["schemas"]
INVOCATIONS = DOCUMENT["paths"]["/invocations"]["post"]
COMMON_ERRORS = {"405", "408", "431"}  # replies that the routes and the guard may give anywhere


TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


def examples(content_type: str) -> dict[str, Any]:
    content = INVOCATIONS["requestBody"]["content"][content_type]
    return {name: example["value"] for name, example in content["examples"].items()}


TEXT_EXAMPLES = examples("application/x-text")
JSON_EXAMPLES = examples("application/json")


def fits(value: object, schema: dict[str, Any]) -> bool:
    """Return whether a value matches a schema, for the schema keywords that the document uses."""
    if "oneOf" in schema:
        return sum(fits(value, each) for each in schema["oneOf"]) == 1
    if "anyOf" in schema:
        return any(fits(value, each) for each in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    if "const" in schema:
        return value == schema["const"]
    named = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if not any(isinstance(value, TYPES[name]) for name in named):
        return False
    if isinstance(value, list):
        enough = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))
        return enough and all(fits(item, schema["items"]) for item in value)
    if isinstance(value, dict):
        known = schema["properties"]
        return (
            set(schema.get("required", ())) <= set(value)
            and set(value) <= set(known)
            and all(fits(item, known[name]) for name, item in value.items())
        )
    if isinstance(value, str):
        return len(value) <= schema.get("maxLength", len(value))
    if isinstance(value, int | float):
        least, most = schema.get("minimum", value), schema.get("maximum", value)
        unit = schema.get("multipleOf")
        return bool(least <= value <= most and (unit is None or value % unit == 0))
    return True


def without_descriptions(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    bare = ((key, item) for key, item in value.items() if key != "description")
    return {key: without_descriptions(item) for key, item in bare}


def nodes(value: object) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for item in value.values():
            yield from nodes(item)
    elif isinstance(value, list):
        for item in value:
            yield from nodes(item)


def test_it_is_json_and_every_reference_leads_somewhere() -> None:
    assert json.loads(json.dumps(RAW)) == RAW
    assert RAW["info"]["version"] == __version__
    references = {node["$ref"].split("/", 4)[3] for node in nodes(RAW) if "$ref" in node}
    assert references == set(SCHEMAS) | set(RAW["components"]["responses"])


def test_its_own_requests_are_read() -> None:
    for text in TEXT_EXAMPLES.values():
        request.parse("application/x-text", text, FACTS)
    for payload in JSON_EXAMPLES.values():
        request.parse("application/json", json.dumps(payload), FACTS)
        schema = INVOCATIONS["requestBody"]["content"]["application/json"]["schema"]
        assert fits(payload, schema)


def test_every_content_type_key_format_and_status_is_described() -> None:
    assert tuple(INVOCATIONS["requestBody"]["content"]) == request.CONTENT_TYPES
    huggingface = SCHEMAS["HuggingFaceRequest"]["properties"]
    forms = [
        (request.KEYS, SCHEMAS["JsonRequest"]["properties"]),
        (request.HUGGINGFACE_KEYS, huggingface),
        (request.PARAMETERS, huggingface["parameters"]["anyOf"][0]["properties"]),
    ]
    for own, described in forms:
        assert tuple(described)[: len(own)] == own
        assert set(described) == {*request.KEYS, *request.HUGGINGFACE_KEYS}
        assert {schema["type"] for key, schema in described.items() if key not in own} == {"null"}
    assert set(JSON_EXAMPLES["every key"]) == set(request.KEYS)
    formats = INVOCATIONS["responses"]["200"]["content"]
    assert list(formats) == [format.media_type for format in reply.FORMATS]
    statuses = {"200", "400", "406", "413", "415", "500", "503", "507"}
    assert set(INVOCATIONS["responses"]) == statuses | COMMON_ERRORS
    for path, statuses in (("ping", {"200", "503"}), ("metrics", {"200"})):
        for method in ("get", "head"):
            found = DOCUMENT["paths"][f"/{path}"][method]["responses"]
            assert set(found) == statuses | COMMON_ERRORS


VALUES: dict[str, list[object]] = {
    "prompt": ["x", ["x", "y"], [], 5],
    "inputs": ["x", ["x", "y"], {}],
    "height": [8, 64, 12, "64"],
    "width": [8, 64, 4],
    "num_inference_steps": [1, 50, 0, 1.5],
    "guidance_scale": [1, 7.5, -1e7, "7.5"],
    "negative_prompt": ["x", 5],
    "num_images_per_prompt": [1, 2, 65],
    "eta": [0, 1, 0.5, 2],
    "seed": [0, 2**64 - 1, -1, "0"],
    "batch_size": [1, 256, 257],
}


@pytest.mark.parametrize("form", ["prompt", "inputs"])
@settings(max_examples=300, deadline=None)
@given(
    asked=st.sets(st.sampled_from(request.PARAMETERS)),
    nulls=st.sets(st.sampled_from([*VALUES, "parameters", "unknown"])),
    inner_nulls=st.sets(st.sampled_from([*VALUES, "parameters", "unknown"])),
    data=st.data(),
)
def test_what_it_allows_is_what_is_read(
    form: str, asked: set[str], nulls: set[str], inner_nulls: set[str], data: st.DataObject
) -> None:
    """Requests of both forms with null keys of either, in every place, and some wrong values."""
    values = {key: data.draw(st.sampled_from(VALUES[key])) for key in sorted({*asked, form})}
    payload: dict[str, Any] = dict.fromkeys(nulls)
    if form == "prompt":
        payload |= values
    else:
        payload[form] = values.pop(form)
        payload["parameters"] = dict.fromkeys(inner_nulls) | values
    described = fits(payload, INVOCATIONS["requestBody"]["content"]["application/json"]["schema"])
    refused = pytest.raises(RequestError)
    with contextlib.nullcontext() if described else refused:
        request.parse("application/json", json.dumps(payload), FACTS)


@pytest.mark.parametrize(
    ("key", "bound", "beyond"),
    [
        (key, bound, beyond)
        for key, schema in SCHEMAS["JsonRequest"]["properties"].items()
        for bound, beyond in (
            (schema.get("minimum"), -1),
            (schema.get("maximum"), schema.get("multipleOf", 1)),
        )
        if bound is not None
    ],
)
def test_its_bounds_are_the_parsers(key: str, bound: int, beyond: int) -> None:
    # If one side has its largest value, the other must be short.
    other = {"height": "width", "width": "height"}.get(key)
    payload = {"prompt": "x", key: bound} | ({other: 8} if other else {})
    request.parse("application/json", json.dumps(payload), FACTS)
    with pytest.raises(RequestError, match=key):
        request.parse("application/json", json.dumps(payload | {key: bound + beyond}), FACTS)


def test_its_defaults_are_the_parsers() -> None:
    found = request.parse("application/json", b'{"prompt": "x"}', FACTS)
    for key, schema in SCHEMAS["JsonRequest"]["properties"].items():
        if "default" in schema:
            assert getattr(found, key) == schema["default"]


@pytest.mark.parametrize("name", [*JSON_EXAMPLES, *TEXT_EXAMPLES])
def test_replies_are_as_described(name: str) -> None:
    text = TEXT_EXAMPLES.get(name)
    kind = "application/json" if text is None else "application/x-text"
    body = json.dumps(JSON_EXAMPLES[name]) if text is None else text
    asked = replace(request.parse(kind, body, FACTS), width=8, height=8)
    pixels = np.zeros((8, 8, 3), np.uint8)
    pictures = [
        Picture(pixels=pixels, seed=0, finish_reason="BLACK", exact=False)
        for _ in range(asked.picture_count)
    ]
    for accept in ("application/json", "application/json;jpeg", "application/json;png"):
        format = reply.negotiate(accept, asked, max_response_bytes=10**6)
        content, media_type = reply.encode(asked, pictures, format)
        schema = INVOCATIONS["responses"]["200"]["content"][media_type]["schema"]
        assert fits(json.loads(content), schema)


def test_its_caps_and_defaults_are_the_codes() -> None:
    text = {"type": "string", "maxLength": LIMITS.max_prompt_characters}
    most = LIMITS.max_request_pictures
    texts = {"type": "array", "items": text, "minItems": 1, "maxItems": most}
    whole = ["integer", "null"]
    side = {
        "type": whole,
        "minimum": SMALLEST_UNIT,
        "maximum": LIMITS.max_generated_side_pixels,
        "multipleOf": SMALLEST_UNIT,
    }
    steps = {"type": whole, "minimum": 1, "default": request.NUM_INFERENCE_STEPS}
    guidance_scale = {
        "type": ["number", "null"],
        "minimum": -LIMITS.max_guidance_scale,
        "maximum": LIMITS.max_guidance_scale,
        "default": request.GUIDANCE_SCALE,
    }
    seed = {"type": whole, "minimum": 0, "maximum": request.SEED_COUNT - 1}
    parameters = {
        "height": side,
        "width": side,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "negative_prompt": {"anyOf": [{"oneOf": [text, texts]}, {"type": "null"}]},
        "num_images_per_prompt": {"type": whole, "minimum": 1, "maximum": most, "default": 1},
        "eta": {"type": ["number", "null"], "minimum": 0, "maximum": 1, "default": 0},
        "seed": seed,
        "batch_size": {"type": whole, "minimum": 1, "maximum": LIMITS.max_generated_batch},
    }
    prompt = {"oneOf": [text, texts]}
    described = SCHEMAS["JsonRequest"]["properties"]
    bare: dict[str, Any] = without_descriptions({key: described[key] for key in request.KEYS})
    assert bare == {"prompt": prompt, **parameters}
    assert SCHEMAS["JsonRequest"]["required"] == ["prompt"]
    huggingface = SCHEMAS["HuggingFaceRequest"]["properties"]
    assert huggingface["inputs"] == prompt
    in_parameters = huggingface["parameters"]["anyOf"][0]["properties"]
    for key in request.PARAMETERS:
        assert in_parameters[key] == described[key]
    assert SCHEMAS["TextRequest"].items() >= text.items()
    for key in ("height", "width"):
        assert f"at most {LIMITS.max_generated_pixels}." in described[key]["description"]
    assert f"at most {most} pictures" in described["num_images_per_prompt"]["description"]
    for name in ("TextReply", "JsonReply"):
        facts = SCHEMAS[name]["properties"]
        assert facts["seeds"]["items"] == seed | {"type": "integer"}
        assert facts["finish_reasons"]["items"]["enum"] == list(reply.FINISH_REASONS)


def test_every_reply_to_invocations_names_the_header_of_its_attributes() -> None:
    for response in INVOCATIONS["responses"].values():
        assert list(response["headers"]) == [app.ATTRIBUTES]
