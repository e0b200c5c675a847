"""Build the server's OpenAPI 3.1 document from the constants that the code itself uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dreambooth import __version__
from dreambooth.diffusion.sampling_request import SMALLEST_UNIT
from dreambooth.limits import LIMITS, Limits
from dreambooth.serving.contract import reply, request

ATTRIBUTES = "X-Amzn-SageMaker-Custom-Attributes"
# Error statuses that a request to any path may get.
COMMON_ERRORS = {
    405: "The path takes another method, which Allow names.",
    408: "The head or the body of the request did not come in time.",
    431: "The head of the request is too large.",
}
# Every status but 200 of POST /invocations, and what it means.
INVOCATION_ERRORS = COMMON_ERRORS | {
    400: "The request cannot be drawn; the message says why.",
    406: "Accept names nothing that is offered.",
    413: "The body is too long.",
    415: "The content type, its charset or the content encoding is not read.",
    500: "A fault of the server; its log has the trace under the request_id.",
    503: "Overloaded, loading, shutting down, or the engine is down: retry after retry_after_s.",
    507: "The pictures do not fit in the device's memory; the message says what would.",
}
_CAT = "a photo of a riobugger cat"
TEXT_EXAMPLES = {"plain": _CAT, "one JSON string": f'"{_CAT}"'}
JSON_EXAMPLES: dict[str, Any] = {
    "shortest": {"prompt": _CAT},
    "every key": {
        "prompt": [_CAT, "a sketch of a riobugger cat"],
        "height": 512,
        "width": 512,
        "num_inference_steps": 25,
        "guidance_scale": 7.5,
        "negative_prompt": "blurred",
        "num_images_per_prompt": 2,
        "eta": 0.0,
        "seed": 1,
        "batch_size": 4,
    },
    "Hugging Face": {"inputs": _CAT, "parameters": {"num_inference_steps": 25, "seed": 1}},
}


def document(*, limits: Limits = LIMITS) -> dict[str, Any]:
    """Return the document, ready for json.dumps."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "DreamBooth container",
            "version": __version__,
            "description": "Pictures from prompts, by JumpStart's contract for Stable Diffusion.",
        },
        "paths": {
            "/invocations": {"post": _invocations()},
            "/ping": {"get": _ping()},
            "/execution-parameters": {"get": _execution_parameters()},
            "/metrics": {"get": _metrics()},
        },
        "components": {"schemas": _requests(limits) | _replies()},
    }


def _invocations() -> dict[str, Any]:
    as_json = {"schema": _one_of("JsonRequest", "HuggingFaceRequest")}
    as_text = {"schema": _ref("TextRequest")}
    in_json = {"schema": _one_of("TextReply", "JsonReply", "HuggingFaceReply")}
    return {
        "operationId": "invocations",
        "summary": "Draw pictures; Accept chooses among the formats of the reply.",
        "requestBody": {
            "required": True,
            "content": {
                request.JSON: as_json | {"examples": _examples(JSON_EXAMPLES)},
                request.TEXT: as_text | {"examples": _examples(TEXT_EXAMPLES)},
            },
        },
        "responses": {
            "200": {
                "description": "The pictures.",
                "headers": _attributes("seed=<base seed>;seconds=<s>;request_id=<id>"),
                "content": {
                    # A picture's raw bytes have no schema.
                    format.media_type: {} if format.kind == "raw" else in_json
                    for format in reply.FORMATS
                },
            }
        }
        | _error_responses(INVOCATION_ERRORS),
    }


def _ping() -> dict[str, Any]:
    return {
        "operationId": "ping",
        "summary": "Whether pictures can be asked for; answered without waiting for the engine.",
        "responses": {
            "200": {"description": "The model is loaded and a first picture came out."},
        }
        | _error_responses(COMMON_ERRORS | {503: "Loading, shutting down, or the engine is down."}),
    }


def _execution_parameters() -> dict[str, Any]:
    integer = {"type": "integer", "minimum": 1}
    properties = {
        "MaxConcurrentTransforms": integer,
        "BatchStrategy": {"const": "SINGLE_RECORD"},
        "MaxPayloadInMB": integer,
    }
    return {
        "operationId": "executionParameters",
        "summary": "What SageMaker's batch transform asks before it starts.",
        "responses": {
            "200": {
                "description": "The parameters.",
                "content": {request.JSON: {"schema": _object(properties, list(properties))}},
            }
        }
        | _error_responses(COMMON_ERRORS),
    }


def _metrics() -> dict[str, Any]:
    return {
        "operationId": "metrics",
        "summary": "Queue, pictures, seconds per step and refusals, as Prometheus reads them.",
        "responses": {
            "200": {
                "description": "Prometheus' text format.",
                "content": {"text/plain": {"schema": {"type": "string"}}},
            }
        }
        | _error_responses(COMMON_ERRORS),
    }


def _requests(limits: Limits) -> dict[str, Any]:
    text = {"type": "string", "maxLength": limits.max_prompt_characters}
    texts = {"type": "array", "items": text, "minItems": 1, "maxItems": limits.max_request_pictures}
    either = {"oneOf": [text, texts]}
    side = {
        "type": "integer",
        "minimum": SMALLEST_UNIT,
        "maximum": limits.max_generated_side_pixels,
        "multipleOf": SMALLEST_UNIT,
        "description": "Pixels; without it the model's own resolution. width x height is at most "
        f"{limits.max_generated_pixels}.",
    }
    most_pictures = limits.max_request_pictures
    parameters: dict[str, Any] = {
        "height": side,
        "width": side,
        "num_inference_steps": _whole(1, None, request.NUM_INFERENCE_STEPS)
        | {"description": "At most what the model's noise schedule has room for, often 999."},
        "guidance_scale": {
            "type": "number",
            "minimum": -limits.max_guidance_scale,
            "maximum": limits.max_guidance_scale,
            "default": request.GUIDANCE_SCALE,
        }
        | {"description": "Has no effect at 1 and below, where a step costs half."},
        "negative_prompt": either
        | {"description": "A list where prompt is a list of the same length."},
        "num_images_per_prompt": _whole(1, most_pictures, 1)
        | {"description": f"All prompts together make at most {most_pictures} pictures."},
        "eta": {"type": "number", "minimum": 0, "maximum": 1, "default": 0}
        | {"description": "Eta of DDIM; other noise schedulers do not read it."},
        "seed": _whole(0, request.SEED_COUNT - 1, None)
        | {"description": "Picture i has seed + i; without it a random one, which is reported."},
        "batch_size": _whole(1, limits.max_generated_batch, None)
        | {"description": "At most so many of these pictures in one U-Net call."},
    }
    huggingface = {"inputs": either, "parameters": {"anyOf": [_object(parameters), _NULL]}}
    return {
        "TextRequest": text
        | {"minLength": 1, "description": "The prompt; one JSON string is unquoted."},
        "JsonRequest": _object({"prompt": either} | parameters, ["prompt"]),
        "HuggingFaceRequest": _object(huggingface, ["inputs"]),
    }


def _replies() -> dict[str, Any]:
    value = {"type": "integer", "minimum": 0, "maximum": 255}
    pixel = {"type": "array", "items": value, "minItems": 3, "maxItems": 3}
    lists = {"type": "array", "items": {"type": "array", "items": pixel}}
    encoded = {"type": "string", "contentEncoding": "base64"}
    picture = {"oneOf": [lists, encoded], "description": "H x W x 3 numbers, or a base64 picture."}
    prompt = {"type": ["string", "array"], "items": {"type": "string"}}
    facts = {
        "prompt": prompt | {"description": "As it was sent."},
        "seeds": {"type": "array", "items": _whole(0, request.SEED_COUNT - 1, None)},
        "finish_reasons": {"type": "array", "items": {"enum": list(reply.FINISH_REASONS)}},
    }
    exact = {"exact": {"const": False, "description": "Exactness was lifted: memory ran out."}}
    error = {
        "code": {"type": "integer"},
        "type": {"type": "string"},
        "message": {"type": "string"},
        "request_id": {"type": "string"},
    }
    one = {"generated_image": picture} | facts
    several = {"generated_images": {"type": "array", "items": picture}} | facts
    retry = {"retry_after_s": {"type": "number", "minimum": 0}}
    return {
        "TextReply": _object(one | exact, list(one)),
        "JsonReply": _object(several | exact, list(several)),
        "HuggingFaceReply": {"oneOf": [encoded, {"type": "array", "items": encoded}]},
        "Error": _object(error | retry, list(error)),
    }


_NULL = {"type": "null"}


def _object(properties: dict[str, Any], required: list[str] | None = None) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return schema | ({"required": required} if required else {})


def _whole(least: int, most: int | None, default: int | None) -> dict[str, Any]:
    bounds = {"minimum": least, "maximum": most, "default": default}
    return {"type": "integer"} | {name: n for name, n in bounds.items() if n is not None}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _one_of(*names: str) -> dict[str, Any]:
    return {"oneOf": [_ref(name) for name in names]}


def _examples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: {"value": value} for name, value in values.items()}


def _error_responses(meanings: Mapping[int, str]) -> dict[str, Any]:
    return {
        str(status): {
            "description": meanings[status],
            "headers": _attributes("request_id=<id>"),
            "content": {request.JSON: {"schema": _ref("Error")}},
        }
        for status in sorted(meanings)
    }


def _attributes(description: str) -> dict[str, Any]:
    return {ATTRIBUTES: {"description": description, "schema": {"type": "string"}}}
