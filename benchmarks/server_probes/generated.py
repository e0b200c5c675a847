"""Generate requests with hypothesis and schemathesis from the server's own OpenAPI description.

Both packages are for development (requirements/dev.txt); outside the tests only this module imports
them.
"""

from __future__ import annotations

import copy
import importlib
import json
from typing import Any, Final

from benchmarks.server_probes.fuzz_verdicts import HANG_S, Verdicts
from benchmarks.server_probes.mutations import Case
from benchmarks.server_probes.raw_client import RawClient
from benchmarks.server_probes.server import HOST, ProbeError, Server

# The most that good requests ask for, so that their work is short; bad ones may ask for anything.
_BOUNDS: Final = {"width": 64, "height": 64, "num_inference_steps": 2, "num_images_per_prompt": 2}
_MOST_PROMPTS: Final = 2
# Replies must fit our own description. Whether a bad request is refused is not checked: the bounds
# above are not the server's, so a request that schemathesis takes for bad may be good here.
_CHECKS: Final = (
    *("response_schema_conformance", "content_type_conformance"),
    *("response_headers_conformance", "status_code_conformance"),
)


def described(server: Server, *, examples: int, seed: int, verdicts: Verdicts) -> None:
    """Send schemathesis' boundary cases and random requests, good and bad, NUL bytes included."""
    schemathesis = _package("schemathesis")
    engine = _package("schemathesis.engine")
    config = _package("schemathesis.config").SchemathesisConfig.from_dict(
        {
            "seed": seed,
            "base-url": f"http://{HOST}:{server.port}",
            "request-timeout": 5 * HANG_S,
            "generation": {
                "mode": "all",
                "max-examples": examples,
                "allow-x00": True,
                "no-shrink": True,
                "database": "none",
            },
            "phases": {"stateful": {"enabled": False}},
            "checks": {"enabled": False, **{name: {"enabled": True} for name in _CHECKS}},
        }
    )
    schema = schemathesis.openapi.from_dict(bounded(_document(server)), config=config)
    for event in engine.from_schema(schema).execute():
        recorder = getattr(event, "recorder", None)
        if recorder is not None:
            _note_all(recorder, verdicts)
        elif type(event).__name__ == "FatalError":
            raise ProbeError(f"schemathesis cannot go on: {event.exception}")


def _note_all(recorder: Any, verdicts: Verdicts) -> None:
    for interaction in recorder.interactions.values():
        request, response = interaction.request, interaction.response
        sent = f"{request.method} {request.uri} {request.headers}".encode() + (request.body or b"")
        if response is None:
            verdicts.note("schemathesis", sent, None, b"", 5 * HANG_S)
        else:
            status, body = response.status_code, response.content
            verdicts.note("schemathesis", sent, status, body, response.elapsed)
    for checks in recorder.checks.values():
        for check in checks:
            if check.failure_info is not None:
                verdicts.violation(str(check.failure_info.failure))


def random_json(server: Server, *, examples: int, seed: int, verdicts: Verdicts) -> None:
    """Send requests that hypothesis makes: our keys with any values, any JSON, text or bytes."""
    hypothesis = _package("hypothesis")
    any_of = _package("hypothesis.strategies")
    client = RawClient(server, timeout_s=5 * HANG_S)

    def send(body: bytes, content_type: str, accept: str) -> None:
        head = f"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: {content_type}\r\n"
        head += f"Accept: {accept}\r\nContent-Length: {len(body)}\r\n\r\n"
        case = Case(method="POST", sent=head.encode() + body)
        answer = client.ask(case)
        verdicts.note("hypothesis", case.sent, answer.status, answer.body, answer.seconds)

    decorated = hypothesis.given(
        _bodies(any_of, sorted(_properties(_document(server)))),
        any_of.sampled_from(["application/json", "application/x-text"]),
        any_of.sampled_from(["application/json", "application/json;jpeg", "image/webp"]),
    )(send)
    settings = hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    try:
        hypothesis.seed(seed)(settings(decorated))()
    finally:
        client.close()


def _bodies(any_of: Any, keys: list[str]) -> Any:
    scalars = any_of.one_of(
        *(any_of.none(), any_of.booleans(), any_of.integers(), any_of.floats(), any_of.text()),
        *(any_of.integers(0, 70), any_of.sampled_from([8, 64, 1e999, 2**64, -1, 0])),
    )
    values = any_of.recursive(
        scalars,
        lambda inner: (
            any_of.lists(inner, max_size=4) | any_of.dictionaries(any_of.text(), inner, max_size=3)
        ),
        max_leaves=8,
    )
    objects = any_of.dictionaries(any_of.sampled_from(keys), values, max_size=6)
    nearly = objects.map(lambda given: {"prompt": "a cat", "num_inference_steps": 1} | given)
    as_json = any_of.one_of(nearly, objects, values).map(lambda value: json.dumps(value).encode())
    text = any_of.text().map(lambda text: text.encode("utf-8", "surrogatepass"))
    return any_of.one_of(as_json, as_json, text, any_of.binary())


def bounded(document: dict[str, Any]) -> dict[str, Any]:
    """Return the description with small pictures and few steps; num_inference_steps is required."""
    smaller = copy.deepcopy(document)
    schemas = smaller["components"]["schemas"]
    parameters = schemas["Parameters"]
    for name, most in _BOUNDS.items():
        parameters["properties"][name]["maximum"] = most
    for name, key in (
        *(("JsonRequest", "num_inference_steps"), ("Parameters", "num_inference_steps")),
        ("HuggingFaceRequest", "parameters"),
    ):
        schemas[name]["required"] = [*schemas[name].get("required", ()), key]
    for choice in schemas["Prompts"]["oneOf"]:
        if choice["type"] == "array":
            choice["maxItems"] = _MOST_PROMPTS
    return smaller


def _properties(document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = document["components"]["schemas"]["JsonRequest"]["properties"]
    return found


def _document(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(server.ask("GET", "/openapi.json").body)
    return found


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ProbeError(
            f"The fuzz probe needs {name.partition('.')[0]}: pip install -r requirements/dev.txt."
        ) from error
