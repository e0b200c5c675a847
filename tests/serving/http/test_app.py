from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dreambooth.diffusion.sampling_request import SamplingFacts
from dreambooth.errors import RequestError, ResourceError, UnavailableError
from dreambooth.serving.contract import openapi
from dreambooth.serving.contract.engine_status import EngineStatus
from dreambooth.serving.contract.reply import FinishReason, Picture
from dreambooth.serving.contract.request import GenerationRequest
from dreambooth.serving.http.app import ATTRIBUTES, App
from dreambooth.serving.http.metrics import Metrics
from dreambooth.serving.supervision.counters import State, SupervisorStatus
from dreambooth.settings.serve_options import ServeSettings

ROOT = Path(__file__).parents[3]
FACTS = SamplingFacts(resolution=64, unit=8, max_steps=999)
SETTINGS = ServeSettings(model="none", max_body_bytes=1000)


@dataclass
class Engine:
    """Stands in for the supervisor, to show states and faults at once."""

    state: State = "ready"
    finish_reasons: Sequence[FinishReason] = ()
    exact: bool = True
    error: Exception | None = None
    forever: bool = False
    seeds: list[int] = field(default_factory=list)
    cancelled: int = 0
    facts: SamplingFacts = FACTS

    async def generate(
        self, request: GenerationRequest, base_seed: int, *, waited_s: float
    ) -> list[Picture]:
        assert 0 <= waited_s < 60
        self.seeds.append(base_seed)
        try:
            await asyncio.sleep(1e6 if self.forever else 0)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        reasons = self.finish_reasons or ["SUCCESS"] * request.picture_count
        pixels = np.full((request.height, request.width, 3), 7, np.uint8)
        return [
            Picture(pixels=pixels, seed=base_seed + i, finish_reason=reason, exact=self.exact)
            for i, reason in enumerate(reasons)
        ]

    def status(self) -> SupervisorStatus:
        nothing: dict[str, Any] = dict.fromkeys((f.name for f in fields(SupervisorStatus)), 0)
        nothing |= {"refusals": (), "losses": (), "engine": EngineStatus()}
        reason = "" if self.state == "ready" else f"The engine is {self.state}."
        return SupervisorStatus(**nothing | {"state": self.state, "reason": reason})


@dataclass
class Reply:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def attributes(self) -> dict[str, str]:
        return dict(part.split("=", 1) for part in self.headers[ATTRIBUTES.lower()].split(";"))


@dataclass
class Client:
    """Calls an ASGI application without a socket."""

    engine: Engine = field(default_factory=Engine)
    metrics: Metrics = field(default_factory=Metrics)
    leave_after_s: float | None = None
    reads: int = 0

    def __post_init__(self) -> None:
        self.app = App(SETTINGS, self.metrics)
        self.app.supervisor = self.engine

    def ask(self, method: str, path: str, *chunks: bytes, **headers: str) -> Reply:
        return asyncio.run(asyncio.wait_for(self.exchange(method, path, chunks, headers), 20))

    def draw(self, body: object = None, **headers: str) -> Reply:
        headers = {"content_type": "application/json", "accept": "application/json;jpeg"} | headers
        return self.ask(
            "POST", "/invocations", json.dumps(body or {"prompt": "a cat"}).encode(), **headers
        )

    async def exchange(
        self, method: str, path: str, chunks: Sequence[bytes], headers: dict[str, str]
    ) -> Reply:
        reply, waiting = Reply(), list(chunks) or [b""]
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if chunks and "transfer-encoding" not in named:
            named.setdefault("content-length", str(sum(map(len, chunks))))

        async def receive() -> dict[str, Any]:
            if waiting:
                self.reads += 1
                body = waiting.pop(0)
                return {"type": "http.request", "body": body, "more_body": bool(waiting)}
            await asyncio.sleep(1e6 if self.leave_after_s is None else self.leave_after_s)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                reply.status = message["status"]
                reply.headers = {
                    name.decode(): value.decode() for name, value in message["headers"]
                }
            else:
                reply.body += message["body"]

        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "headers": [(n.lower().encode(), v.encode()) for n, v in named.items()],
        }
        await self.app(scope, receive, send)
        return reply


def error_of(reply: Reply) -> dict[str, Any]:
    found = reply.json
    assert isinstance(found, dict)
    assert found["code"] == reply.status
    assert set(found) - {"retry_after_s"} == {"code", "type", "message", "error", "request_id"}
    assert reply.headers["content-type"] == "application/json"
    assert reply.attributes == {"request_id": found["request_id"]}
    return found


def test_the_server_process_needs_no_torch() -> None:
    code = (
        "import sys, dreambooth.serving.http.server; "
        "print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def test_ping_is_200_and_empty_when_ready() -> None:
    reply = Client().ask("GET", "/ping")
    assert (reply.status, reply.body) == (200, b"")


@pytest.mark.parametrize("state", ["loading", "down", "closing"])
def test_nothing_is_taken_in_other_states_and_the_reason_is_reported(state: State) -> None:
    client = Client(Engine(state=state))
    for reply in (client.ask("GET", "/ping"), client.draw()):
        error = error_of(reply)
        assert (reply.status, error["type"]) == (503, "UnavailableError")
        assert error["message"] == f"The engine is {state}."
        assert error["retry_after_s"] == float(reply.headers["retry-after"])
    assert client.engine.seeds == []
    assert client.reads == 0, "the body is not read"
    assert client.metrics.refusals == {state: 1}


def test_before_there_is_a_supervisor_and_while_shutting_down_it_is_503_too() -> None:
    client = Client()
    client.app.closing = True
    assert "shutting down" in error_of(client.ask("GET", "/ping"))["message"]
    client.app.closing, client.app.supervisor = False, None
    assert "fetched" in error_of(client.draw())["message"]


def test_a_reply_names_seed_seconds_and_request() -> None:
    reply = Client().draw({"prompt": ["a", "b"], "seed": 5})
    assert reply.status == 200
    assert reply.headers["content-type"] == "application/json;jpeg"
    assert set(reply.attributes) == {"seed", "seconds", "request_id"}
    assert reply.attributes["seed"] == "5"
    assert 0 <= float(reply.attributes["seconds"]) < 20
    assert len(reply.json["generated_images"]) == 2


def test_without_a_seed_one_is_drawn_and_returned() -> None:
    client = Client()
    seeds = [int(client.draw().attributes["seed"]) for _ in range(3)]
    assert seeds == client.engine.seeds
    assert len(set(seeds)) == 3
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_pictures_that_are_none_are_reported_in_the_header_of_a_raw_reply_as_well() -> None:
    client = Client(Engine(finish_reasons=["BLACK"], exact=False))
    reply = client.draw(accept="image/png")
    assert reply.body.startswith(b"\x89PNG")
    assert reply.attributes["finish_reasons"] == "BLACK"
    assert reply.attributes["exact"] == "false"
    assert client.metrics.pictures == {"BLACK": 1}


def test_the_header_stays_within_what_sagemaker_hands_on() -> None:
    reasons: list[FinishReason] = ["CONTENT_FILTERED"] * 63 + ["SUCCESS"]
    reply = Client(Engine(finish_reasons=reasons)).draw(
        {"prompt": "x", "num_images_per_prompt": 64, "seed": 2**64 - 100}
    )
    assert reply.attributes["finish_reasons"] == "CONTENT_FILTERED,SUCCESS"
    assert len(reply.headers[ATTRIBUTES.lower()]) <= 1024


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (RequestError("Too wide."), 400, "RequestError"),
        (ResourceError("No memory for it."), 507, "ResourceError"),
        (UnavailableError("Too busy.", 12.5), 503, "UnavailableError"),
    ],
)
def test_named_errors_say_their_sentence(error: Exception, status: int, kind: str) -> None:
    reply = Client(Engine(error=error)).draw()
    told = error_of(reply)
    assert (reply.status, told["type"], told["message"]) == (status, kind, str(error))
    assert told.get("retry_after_s") == (12.5 if status == 503 else None)


def test_an_unknown_exception_is_reported_in_the_log_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    reply = Client(Engine(error=KeyError("secret place"))).draw()
    told = error_of(reply)
    assert (reply.status, told["type"], told["message"]) == (500, "InternalError", "internal error")
    assert b"secret" not in reply.body
    assert told["request_id"] in caplog.text
    assert "secret place" in caplog.text


READ = ["/ping", "/metrics", "/execution-parameters", "/openapi.json"]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "head"])
@pytest.mark.parametrize("path", READ)
def test_other_methods_get_405_with_what_is_allowed(method: str, path: str) -> None:
    reply = Client().ask(method, path)
    assert (reply.status, reply.headers["allow"]) == (405, "GET, HEAD")
    error_of(reply)


@pytest.mark.parametrize("state", ["ready", "loading", "down", "closing"])
@pytest.mark.parametrize("path", [*READ, "/nowhere"])
def test_head_has_the_status_and_headers_of_get(path: str, state: State) -> None:
    heads = []
    for method in ("GET", "HEAD"):
        reply = Client(Engine(state=state)).ask(method, path)
        reply.headers.pop(ATTRIBUTES.lower(), None)  # the id differs
        if path == "/metrics":  # which counts, so that numbers grow longer
            assert int(reply.headers.pop("content-length")) > 0
        heads.append((reply.status, reply.headers))
    assert heads[0] == heads[1]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_invocations_take_post_only(method: str) -> None:
    reply = Client().ask(method, "/invocations")
    assert (reply.status, reply.headers["allow"]) == (405, "POST")


def test_the_description_names_every_path_with_its_methods() -> None:
    described = openapi.document()["paths"]
    assert set(described) == {"/invocations", *READ} - {"/openapi.json"}
    for path, operations in described.items():
        for method in ("GET", "HEAD", "POST", "PUT"):
            is_taken = Client().ask(method, path).status != 405
            assert is_taken == (method.lower() in operations)


def test_unknown_paths_get_404_and_make_no_series_of_their_own() -> None:
    client = Client()
    for path in ("/", "/pin", "/ping/", "/invocations/x", "/\n\x00é"):
        assert error_of(client.ask("GET", path))["code"] == 404
    assert set(client.metrics.requests) == {("other", 404)}


def test_a_body_that_says_it_is_too_long_is_not_read() -> None:
    client = Client()
    reply = client.ask("POST", "/invocations", b"x" * 1001, content_type="application/x-text")
    assert error_of(reply)["code"] == 413
    assert client.reads == 0
    assert reply.headers["connection"] == "close"


def test_a_chunked_body_is_read_up_to_the_cap_only() -> None:
    client = Client()
    chunks = [b"x" * 100] * 50
    reply = client.ask("POST", "/invocations", *chunks, transfer_encoding="chunked")
    assert error_of(reply)["code"] == 413
    assert client.reads == 11


def test_a_compressed_body_gets_415() -> None:
    client = Client()
    assert error_of(client.draw(content_encoding="gzip"))["code"] == 415
    assert client.reads == 0
    assert client.draw(content_encoding="identity").status == 200
    assert error_of(client.draw(transfer_encoding="gzip, chunked"))["code"] == 415


def test_wrong_requests_never_reach_the_engine() -> None:
    client = Client()
    assert client.draw({"prompt": "x", "widht": 8}).status == 400
    assert client.draw(content_type="text/csv").status == 415
    assert client.draw(accept="text/html").status == 406
    assert client.draw({"prompt": ["x", "y"]}, accept="image/png").status == 400
    assert client.engine.seeds == []


def test_a_client_that_leaves_cancels_its_work(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    client = Client(Engine(forever=True), leave_after_s=0.05)
    reply = client.draw()
    assert reply.status == 0, "nothing is sent"
    assert client.engine.cancelled == 1
    assert client.metrics.requests == {("/invocations", 499): 1}
    assert client.metrics.requests_in_flight == 0
    assert "Traceback" not in caplog.text


def test_a_client_that_leaves_in_its_body_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    client = Client()

    async def test() -> None:
        async def receive() -> dict[str, Any]:
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            raise AssertionError(message)

        scope = {"type": "http", "method": "POST", "path": "/invocations", "headers": []}
        await client.app(scope, receive, send)

    asyncio.run(test())
    assert "499" in caplog.text
    assert "Traceback" not in caplog.text


def test_a_task_that_is_cancelled_leaves_no_work_and_no_count() -> None:
    client = Client(Engine(forever=True))

    async def test() -> None:
        asking = asyncio.create_task(
            client.exchange(
                "POST", "/invocations", [b"a cat"], {"content-type": "application/x-text"}
            )
        )
        await asyncio.sleep(0.05)
        assert client.metrics.requests_in_flight == 1
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    asyncio.run(test())
    assert client.engine.cancelled == 1
    assert client.metrics.requests_in_flight == 0


def test_each_request_has_one_line_and_pings_only_when_they_change(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "dreambooth")
    client = Client()
    for state in ("loading", "loading", "ready", "ready", "ready", "down"):
        client.engine.state = state  # type: ignore[assignment]
        client.ask("GET", "/ping")
    client.engine.state = "ready"
    request_id = client.draw().attributes["request_id"]
    client.ask("GET", "/\n2026 POST /invocations 200")
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split()[:3] for line in lines[:3]] == [
        ["GET", "/ping", status] for status in ("503", "200", "503")
    ]
    assert lines[3].startswith("POST /invocations 200 ")
    assert lines[3].endswith(f"id={request_id} pictures=1")
    assert len(lines) == 5
    assert "\n" not in lines[4]


def test_batch_transform_gets_a_sentence_on_what_to_send() -> None:
    found = Client().ask("GET", "/execution-parameters").json
    assert found == {
        "MaxConcurrentTransforms": 8,
        "BatchStrategy": "SINGLE_RECORD",
        "MaxPayloadInMB": 1,  # bodies of up to 1 MiB are accepted
    }


@pytest.mark.parametrize(("accept", "most"), [("application/json;png", 160), ("image/png", 60)])
def test_a_reply_that_came_out_too_long_is_reported_and_not_sent(accept: str, most: int) -> None:
    client = Client()
    client.app = App(replace(SETTINGS, max_response_bytes=most), client.metrics)
    client.app.supervisor = client.engine
    reply = client.draw(accept=accept)
    told = error_of(reply)
    assert reply.status == 400
    assert "--max_response_bytes" in told["message"]
    assert client.metrics.requests_in_flight == 0


def test_openapi_and_metrics_are_there_in_every_state() -> None:
    client = Client(Engine(state="down"))
    assert client.ask("GET", "/openapi.json").json["openapi"].startswith("3.")
    reply = client.ask("GET", "/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert b"dreambooth_requests_in_flight 0.0" in reply.body


def test_ping_answers_while_pictures_are_encoded() -> None:
    client = Client()
    body = json.dumps({"prompt": "x", "width": 1024, "height": 1024, "num_images_per_prompt": 8})
    headers = {"content-type": "application/json", "accept": "application/json;png"}

    async def test() -> None:
        loop = asyncio.get_running_loop()
        asking = asyncio.create_task(
            client.exchange("POST", "/invocations", [body.encode()], headers)
        )
        pings = 0
        while not asking.done():
            start = loop.time()
            assert (await client.exchange("GET", "/ping", (), {})).status == 200
            assert loop.time() - start < 1
            pings += 1
            await asyncio.sleep(0.001)
        assert (await asking).status == 200
        assert pings > 2

    asyncio.run(asyncio.wait_for(test(), 20))
