"""Define the routes of the server as an ASGI application that answers errors as one JSON body.

It has no sockets, signals or processes. The supervisor of the engine is set once there is one; it
is absent while the model is being fetched. If a client leaves while it waits, its work is
cancelled. Unexpected exceptions are caught here, in the outermost layer of a request.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final, Protocol, TypeVar

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dreambooth.diffusion.sampling_request import SamplingFacts
from dreambooth.errors import RequestError, UnavailableError
from dreambooth.limits import MIB
from dreambooth.serving.contract import error_reply, openapi, reply, request
from dreambooth.serving.contract.error_reply import ErrorReply
from dreambooth.serving.contract.reply import Picture, ReplyFormat
from dreambooth.serving.contract.request import GenerationRequest
from dreambooth.serving.http.exchange import ClientLeft, Exchange
from dreambooth.serving.http.metrics import Metrics
from dreambooth.serving.supervision.counters import State, SupervisorStatus
from dreambooth.settings.serve_options import ServeSettings

JSON: Final = "application/json"
ATTRIBUTES: Final = "X-Amzn-SageMaker-Custom-Attributes"
# AWS, InvokeEndpoint: CustomAttributes, at most 1,024 characters of US-ASCII.
MAX_ATTRIBUTES_CHARACTERS: Final = 1_024
# Batch transform sends this many records at once; more would only wait in the queue.
MAX_CONCURRENT_TRANSFORMS: Final = 8
# Longer bodies are parsed in a thread: one of 1 MiB takes 10 to 30 ms.
_QUICK_BYTES: Final = 16_384
# Seconds until a client should ask again; a server that shuts down is replaced by another one.
_RETRY_S: Final[Mapping[State, float]] = {"loading": 5.0, "down": 5.0, "closing": 30.0}
# The status that is logged for a client that left before its reply; nothing is sent.
CLIENT_LEFT_STATUS: Final = 499

log = logging.getLogger(__name__)
T = TypeVar("T")


class PictureSource(Protocol):
    """The part of the engine's supervisor that the routes use."""

    @property
    def facts(self) -> SamplingFacts:
        """Return what the model can draw."""

    async def generate(
        self, request: GenerationRequest, base_seed: int, *, waited_s: float
    ) -> list[Picture]:
        """Draw the pictures; cancelling the task that waits here cancels the work."""

    def status(self) -> SupervisorStatus:
        """Return a snapshot without asking the engine."""


class NotReady(UnavailableError):
    """No picture can be requested in this state."""

    def __init__(self, reason: str, state: State) -> None:
        super().__init__(reason, _RETRY_S[state])
        self.state = state


class App:
    """The ASGI application; `supervisor` is set once there is one, `close` ends the threads."""

    def __init__(self, settings: ServeSettings, metrics: Metrics) -> None:
        self.supervisor: PictureSource | None = None
        self.closing = False
        self._settings = settings
        self._metrics = metrics
        self._last_ping = 0
        self._openapi = json.dumps(openapi.document()).encode()
        # They parse long bodies and encode pictures. Pillow's encoders release the GIL, so more
        # threads than cores would not be faster; beyond four the GPU is what clients wait for.
        workers = min(4, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="codec")
        # uvicorn leaves the body of a reply to HEAD out.
        reading = ("GET", "HEAD")
        self._routes: Mapping[
            str, tuple[Sequence[str], Callable[[Exchange], Awaitable[Response]]]
        ] = {
            "/ping": (reading, self._ping),
            "/invocations": (("POST",), self._invocations),
            "/execution-parameters": (reading, self._execution_parameters),
            "/metrics": (reading, self._metrics_text),
            "/openapi.json": (reading, self._openapi_document),
        }

    def close(self) -> None:
        """End the threads without waiting for their remaining work."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one HTTP request, whatever happens inside."""
        exchange = Exchange(scope, receive)
        status = CLIENT_LEFT_STATUS
        try:
            try:
                response = await self._respond(exchange)
            except ClientLeft:
                return
            except Exception as error:  # the request's border
                response = self._refuse(exchange, error)
            status = response.status_code
            await response(scope, receive, send)
        finally:
            self._log_and_count(exchange, status)

    async def _respond(self, exchange: Exchange) -> Response:
        path, method = exchange.path, exchange.method
        if path not in self._routes:
            raise RequestError(f"There is nothing at {path[:100]!r}; see /openapi.json.", 404)
        allowed, handle = self._routes[path]
        if method not in allowed:
            error = ErrorReply(
                status=405,
                type="RequestError",
                message=f"{path} takes {' and '.join(allowed)} only, not {method}.",
                allow=", ".join(allowed),
            )
            return self._error(exchange, error)
        return await handle(exchange)

    # The routes.

    async def _ping(self, exchange: Exchange) -> Response:
        """Return 200 and no body if pictures can be requested; never wait for the engine."""
        refusal = self._why_not_ready()
        return Response() if refusal is None else self._error(exchange, error_reply.of(refusal))

    async def _invocations(self, exchange: Exchange) -> Response:
        with self._metrics.in_flight():
            supervisor, refusal = self.supervisor, self._why_not_ready()
            if refusal is not None:
                self._metrics.refused(refusal.state)
                raise refusal
            assert supervisor is not None
            headers = exchange.headers
            body = await exchange.body(self._settings.max_body_bytes)
            read = partial(self._parse_request, headers, body, supervisor.facts)
            wanted, format = await self._in_thread(read) if len(body) > _QUICK_BYTES else read()
            seed = secrets.randbits(32) if wanted.seed is None else wanted.seed
            pictures = await exchange.unless_client_leaves(
                supervisor.generate(wanted, seed, waited_s=exchange.seconds)
            )
            exchange.pictures = len(pictures)
            self._metrics.drawn(pictures)
            encode = partial(
                reply.encode,
                wanted,
                pictures,
                format,
                max_response_bytes=self._settings.max_response_bytes,
            )
            quick = reply.is_quick(pictures, format)
            content, media_type = encode() if quick else await self._in_thread(encode)
            attributes = self._attributes(exchange, seed, pictures)
            return Response(content, headers={"content-type": media_type, ATTRIBUTES: attributes})

    def _parse_request(
        self, headers: Headers, body: bytes, facts: SamplingFacts
    ) -> tuple[GenerationRequest, ReplyFormat]:
        """Return the request and the format of its reply, both fully checked."""
        wanted = request.parse(headers.get("content-type"), body, facts)
        most = self._settings.max_response_bytes
        accept = ", ".join(headers.getlist("accept"))
        return wanted, reply.negotiate(accept, wanted, max_response_bytes=most)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def _execution_parameters(self, exchange: Exchange) -> Response:
        """Return what batch transform reads first (AWS, "How containers serve requests")."""
        rows = self._settings.batch_rows or MAX_CONCURRENT_TRANSFORMS
        parameters = {
            "MaxConcurrentTransforms": min(
                rows, self._settings.max_queue, MAX_CONCURRENT_TRANSFORMS
            ),
            "BatchStrategy": "SINGLE_RECORD",
            # A record of more bytes would be refused with 413; 0 would mean no limit.
            "MaxPayloadInMB": max(1, self._settings.max_body_bytes // MIB),
        }
        return Response(json.dumps(parameters), media_type=JSON)

    async def _metrics_text(self, exchange: Exchange) -> Response:
        return Response(self._metrics.text(), headers={"content-type": self._metrics.CONTENT_TYPE})

    async def _openapi_document(self, exchange: Exchange) -> Response:
        return Response(self._openapi, media_type=JSON)

    # Refusals, headers and log lines.

    def _why_not_ready(self) -> NotReady | None:
        """Return why no picture can be requested at the moment, or None if one can."""
        state: State = "loading"
        reason = "The model is being fetched."
        if self.closing:
            state, reason = "closing", "The server is shutting down."
        elif self.supervisor is not None:
            status = self.supervisor.status()
            state, reason = status.state, status.reason
        return None if state == "ready" else NotReady(reason, state)

    def _refuse(self, exchange: Exchange, error: Exception) -> Response:
        refusal = error_reply.of(error)
        if refusal.status == 500:
            log.error("request %s failed", exchange.request_id, exc_info=error)
        return self._error(exchange, refusal)

    def _error(self, exchange: Exchange, error: ErrorReply) -> Response:
        headers = {"content-type": JSON, ATTRIBUTES: f"request_id={exchange.request_id}"}
        if error.allow:
            headers["allow"] = error.allow
        if error.retry_after_s is not None:
            headers["retry-after"] = str(max(1, round(error.retry_after_s)))
        if exchange.has_unread_body():
            headers["connection"] = "close"  # the rest of the body is no next request
        return Response(error.body(exchange.request_id), error.status, headers)

    def _attributes(self, exchange: Exchange, base_seed: int, pictures: Sequence[Picture]) -> str:
        """Return the custom attributes of a reply, which SageMaker passes on to the client."""
        attributes = (
            f"seed={base_seed};seconds={exchange.seconds:.3f};request_id={exchange.request_id}"
        )
        if not all(picture.exact for picture in pictures):
            attributes += ";exact=false"
        reasons = [picture.finish_reason for picture in pictures]
        if any(reason != "SUCCESS" for reason in reasons):
            in_full = f"{attributes};finish_reasons={','.join(reasons)}"
            few = f"{attributes};finish_reasons={','.join(sorted(set(reasons)))}"
            attributes = in_full if len(in_full) <= MAX_ATTRIBUTES_CHARACTERS else few
        return attributes

    def _log_and_count(self, exchange: Exchange, status: int) -> None:
        """Count the request and log it; log a ping only if its status has changed."""
        path = exchange.path
        self._metrics.answered(path if path in self._routes else "other", status, exchange.seconds)
        if path == "/ping":
            if status == self._last_ping:
                return
            self._last_ping = status
        log.info(
            "%s %s %d %.3f s id=%s pictures=%d",
            exchange.method,
            ascii(exchange.path[:100])[1:-1],
            status,
            exchange.seconds,
            exchange.request_id,
            exchange.pictures,
        )
