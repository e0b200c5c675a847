"""Keep one engine process running and request pictures from it, in the server's process.

An engine process that ends is replaced; one that hangs or sends invalid messages is killed and
replaced. Requests are accepted or refused here, before they are sent to the engine. This module
needs no torch.

A request that was in the engine when its process died is answered with UnavailableError, which says
when to retry. It is NOT tried again here: it may be what killed the process, and only its client
can decide whether it still wants the pictures.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, get_args

from dreambooth.diffusion.sampling_request import SamplingFacts, SamplingRequest, read_facts
from dreambooth.errors import ModelArtifactError, RequestError, UnavailableError, UserError
from dreambooth.serving.contract.engine_status import EngineStatus
from dreambooth.serving.contract.reply import Picture
from dreambooth.serving.contract.request import GenerationRequest
from dreambooth.serving.supervision import admission
from dreambooth.serving.supervision.admission import Bounds, EngineSpeed, Work
from dreambooth.serving.supervision.counters import (
    LossReason,
    RefusalReason,
    State,
    SupervisorStatus,
)
from dreambooth.serving.supervision.engine_process import COMMAND, EngineProcess, arguments
from dreambooth.serving.supervision.messages import (
    Cancel,
    Close,
    EngineFaultError,
    Failed,
    FromEngine,
    Generate,
    LoadFailed,
    Ready,
    WireError,
)
from dreambooth.serving.supervision.pending_requests import PendingRequest, PendingRequests
from dreambooth.serving.supervision.restart_policy import Listener, RestartPolicy
from dreambooth.serving.supervision.watchdog import EngineTimeouts
from dreambooth.settings.serve_options import ServeSettings

__all__ = ["State", "Supervisor", "SupervisorStatus"]

# A guess at how long loading takes, used until it has been measured.
_LOAD_S: Final = 30.0
# When to retry if this server shuts down or cannot load its model: another one must take over.
_RETRY_OTHER_SERVER_S: Final = 30.0
# A call hangs after this many times its estimate, but not before `EngineTimeouts.step_s`.
_SLOWEST_CALL: Final = 4.0
# After this many failed loads in a row no other process is started: _TRIES with a fault of ours,
# _SILENT_TRIES that reported no reason, which a lack of memory can cause too.
_TRIES: Final = 3
_SILENT_TRIES: Final = 8
_NO_MODEL: Final = "The model cannot be loaded: the server's log says why."
# How long the engine may take to end by itself once it has nothing to do.
_CLOSE_S: Final = 2.0
_DRAIN_S: Final = 0.01

log = logging.getLogger(__name__)


class Supervisor(Listener):
    """The engine as the server sees it; everything runs in the event loop of `start`.

    folder: a diffusers folder. timeouts: the time limits of an engine. command: the command that
    starts an engine process; tests pass others.
    """

    def __init__(
        self,
        folder: Path,
        settings: ServeSettings,
        *,
        timeouts: EngineTimeouts | None = None,
        command: Sequence[str] = COMMAND,
    ) -> None:
        self._folder = folder
        self._settings = settings
        self._bounds = Bounds(
            max_queue=settings.max_queue, request_timeout_s=settings.request_timeout_s
        )
        self._restart_policy = RestartPolicy(
            (*command, *arguments(folder, settings)), timeouts or EngineTimeouts(), self
        )
        self._state: State = "loading"
        self._reason = "The model is being loaded."
        self._facts: SamplingFacts | None = None
        self._engine_speed: EngineSpeed | None = None
        self._load_s: float | None = None
        self._pending = PendingRequests()
        self._request_ids = itertools.count(1)
        self._refusals: Counter[RefusalReason] = Counter(dict.fromkeys(get_args(RefusalReason), 0))
        self._losses: Counter[LossReason] = Counter(dict.fromkeys(get_args(LossReason), 0))
        self._engine = EngineStatus()
        self._ended = EngineStatus()  # the counters of the engines before it
        self._failure: UserError | EngineFaultError | None = None
        self._given_up = asyncio.Event()
        self._load_faults = self._silent_exits = 0  # failed loads since an engine was last ready
        self._load_reported = False  # whether this process has sent Ready or LoadFailed
        self._first_start_over = asyncio.Event()  # the first start has succeeded or failed
        self._closed = asyncio.Event()
        self._running: asyncio.Task[None] | None = None

    @property
    def state(self) -> State:
        """Return loading, ready, down (between two processes, silent, or for good) or closing."""
        silent = self._state == "ready" and self._restart_policy.quiet
        return "down" if silent else self._state

    @property
    def reason(self) -> str:
        """Return why the engine is not ready, in one sentence, or ""."""
        silent = "The engine gives no sign of life."
        return self._reason if self._state == self.state else silent

    @property
    def facts(self) -> SamplingFacts:
        """Return what the model can draw; raise UnavailableError until `start` has read it."""
        if self._facts is None:
            raise UnavailableError(self._reason, self._retry_after_s())
        return self._facts

    async def start(self) -> None:
        """Start the engine and wait until it is ready for the first time.

        Raises UserError (ModelArtifactError) for a model that cannot be loaded, or not with these
        settings, and EngineFaultError if loading failed several times, by a fault of ours or
        without a reported reason. The state is "down" then, and no other process is started. Other
        failures are tried again, so this may wait for long; to stop waiting, cancel it and call
        `close`.
        """
        try:
            self._facts = await asyncio.to_thread(read_facts, self._folder)
        except ModelArtifactError as error:
            self._give_up(error)
            raise
        self._bounds = replace(
            self._bounds,
            calls_per_step=self._facts.calls_per_step,
            min_steps=self._facts.min_steps,
            unit=self._facts.unit,
        )
        self._running = asyncio.create_task(self._restart_policy.run(), name="engine")
        self._running.add_done_callback(self._restart_policy_ended)
        await self._first_start_over.wait()
        if self._failure is not None:
            raise self._failure

    async def wait_until_given_up(self) -> None:
        """Wait until no engine can be loaded any more, and raise the reason, as `start` does."""
        await self._given_up.wait()
        assert self._failure is not None
        raise self._failure

    async def generate(
        self, request: GenerationRequest, base_seed: int, *, waited_s: float = 0.0
    ) -> list[Picture]:
        """Return the request's pictures in order; picture i has the seed base_seed + i.

        waited_s: how long ago the request arrived; it is answered within request_timeout_s from
        then on or not at all. Raises UnavailableError if it is refused (before it is sent to the
        engine), if it is late nevertheless, and at once if the engine's process ends; it is not
        tried again (see above). Raises RequestError if even an idle engine could not draw it in
        time, ResourceError and RequestError as the engine does, EngineFaultError for a fault of
        ours there. If the task is cancelled here, its work stops at the engine's next step.
        """
        pictures = request.sampling_requests(base_seed)
        pending_request, process = self._admit(request, pictures, waited_s)
        allowed_s = self._settings.request_timeout_s - waited_s
        self._pending.add(pending_request)
        try:
            async with asyncio.timeout(allowed_s):
                await process.send(
                    Generate(
                        request_id=pending_request.request_id,
                        pictures=pictures,
                        batch_size=request.batch_size,
                    )
                )
                return await pending_request.result
        except TimeoutError as error:
            self._losses["late"] += 1
            raise UnavailableError(
                "The pictures were not done within the "
                f"{self._settings.request_timeout_s:g} s of --request_timeout_s: the server is "
                "slower than it was measured to be.",
                admission.SHORTEST_RETRY_S,
            ) from error
        except WireError as error:
            raise RequestError("The request's texts are too long.", 413) from error
        except asyncio.CancelledError:
            self._losses["cancelled"] += 1
            raise
        finally:
            self._pending.remove(pending_request)
            if pending_request.result.cancelled() or not pending_request.result.done():
                process.send_soon(Cancel(request_id=pending_request.request_id))

    def status(self) -> SupervisorStatus:
        """Return a snapshot without waiting for the engine."""
        process = self._restart_policy.process
        return SupervisorStatus(
            state=self.state,
            reason=self.reason,
            requests_in_flight=len(self._pending),
            pictures_in_flight=self._pending.picture_count,
            restarts_total=self._restart_policy.restarts,
            refusals=tuple(self._refusals.items()),
            losses=tuple(self._losses.items()),
            load_seconds=self._load_s,
            engine_pid=process.pid if process is not None else None,
            engine=self._engine.after(self._ended),
        )

    async def close(self, grace_s: float = 25.0) -> None:
        """Accept no more requests, finish the accepted ones, and end the engine's process.

        Requests not finished within `grace_s` seconds get UnavailableError. This may be called in
        any state, and repeatedly.
        """
        if self._state == "closing":
            await self._closed.wait()
            return
        process = self._restart_policy.process if self._state == "ready" else None
        self._set("closing", "The server is shutting down.")
        try:
            if process is not None:
                await self._drain(process, grace_s)
            if self._running is not None:
                self._running.cancel()
                await asyncio.gather(self._running, return_exceptions=True)
        finally:
            self._first_start_over.set()
            self._closed.set()

    async def _drain(self, process: EngineProcess, grace_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                while len(self._pending):
                    await asyncio.sleep(_DRAIN_S)
        message = f"The server was stopped, and {grace_s:g} s were not enough to finish."
        self._fail_pending("closing", message)
        process.send_soon(Close())
        if not await process.wait(_CLOSE_S):
            log.warning("the engine does not end by itself and is killed")

    # Callbacks of the restart policy.

    @property
    def finished(self) -> bool:
        """Return whether no further engine process should be started."""
        return self._state == "closing" or self._failure is not None

    def starting(self) -> None:
        """Note that a process is about to be started."""
        self._load_reported = False
        if self._state != "closing":
            self._set("loading", "The model is being loaded.")

    def received(self, message: FromEngine) -> None:
        """Handle a message of the engine."""
        if isinstance(message, Ready):
            self._ready(message)
        elif isinstance(message, LoadFailed):
            self._load_failed(message.fault.exception())
        elif isinstance(message, EngineStatus):
            self._note(message)
        else:
            if isinstance(message, Failed):
                self._losses["engine_error"] += 1
            self._pending.take(message)

    def lost(self) -> None:
        """Fail every pending request at once, since the engine is gone."""
        self._engine_speed = None
        self._ended = EngineStatus().after(self._engine.after(self._ended))
        self._engine = EngineStatus()
        if not self._load_reported:
            self._died_silently()
        if not self.finished:
            self._set("down", "The engine has stopped and is being restarted.")
        self._fail_pending(
            "engine_died",
            "The engine stopped while it worked on this request; it is being restarted.",
        )

    def _ready(self, message: Ready) -> None:
        self._engine_speed = EngineSpeed(
            seconds_per_call=message.seconds_per_call,
            seconds_per_decode=message.seconds_per_decode,
            rows=message.rows,
            pixels=self.facts.resolution**2,
            padded=self._settings.batch_rows is not None,
        )
        self._load_s = time.monotonic() - self._restart_policy.started
        self._load_reported, self._load_faults, self._silent_exits = True, 0, 0
        if self._state != "closing":
            self._set("ready", "")
        log.info("the engine is ready after %.1f s", self._load_s)
        self._first_start_over.set()

    def _note(self, status: EngineStatus) -> None:
        before, self._engine = self._engine, status
        if self._engine_speed is None:
            return
        calls_made = status.calls_total - before.calls_total
        self._pending.calls_were_made(calls_made, self._engine_speed)
        measured = {**dict(self._engine_speed.seconds_per_call), **dict(status.seconds_per_call)}
        self._engine_speed = replace(
            self._engine_speed,
            seconds_per_call=tuple(measured.items()),
            seconds_per_decode=status.seconds_per_decode,
        )
        largest = max((work.pixels for work in self._pending.ahead()), default=0)
        self._restart_policy.allow(
            _SLOWEST_CALL * self._engine_speed.seconds(self._engine_speed.rows, largest)
        )

    def _load_failed(self, error: Exception) -> None:
        """Give up if no other try can load the model; a lack of memory may pass."""
        self._load_reported = True
        if isinstance(error, EngineFaultError):
            self._load_faults += 1
            if self._load_faults < _TRIES:
                return
            error = EngineFaultError(
                f"The engine could not load the model in {_TRIES} tries ({error}): see the log."
            )
        if isinstance(error, (UserError, EngineFaultError)):
            self._give_up(error)

    def _died_silently(self) -> None:
        self._silent_exits += 1
        if self._silent_exits == _SILENT_TRIES and not self.finished:
            message = f"The engine ended {_SILENT_TRIES} times before it was ready: see the log."
            self._give_up(EngineFaultError(message))

    def _fail_pending(self, reason: LossReason, message: str) -> None:
        self._losses[reason] += self._pending.fail_all(message, self._retry_after_s())

    def _give_up(self, error: UserError | EngineFaultError) -> None:
        if self._first_start_over.is_set():  # otherwise `start` raises it
            log.error("the model cannot be loaded any more: %s", error)
        self._failure = error
        self._set("down", _NO_MODEL)  # the error may name folders, which are no client's business
        self._first_start_over.set()
        self._given_up.set()

    def _restart_policy_ended(self, running: asyncio.Task[None]) -> None:
        """Set the state to "down" if the restart policy ended by an error, a fault of ours."""
        if not running.cancelled() and running.exception() is not None:
            log.critical("the engine is not restarted any more", exc_info=running.exception())
            self._set("down", "The server has an internal error; it must be started anew.")
            self._first_start_over.set()

    def _set(self, state: State, reason: str) -> None:
        self._state, self._reason = state, reason

    # Admission.

    def _admit(
        self, request: GenerationRequest, pictures: Sequence[SamplingRequest], waited_s: float
    ) -> tuple[PendingRequest, EngineProcess]:
        state, speed, process = self.state, self._engine_speed, self._restart_policy.process
        if state != "ready":
            raise self._refused(state, self.reason, self._retry_after_s())
        assert speed is not None
        assert process is not None
        request_id = next(self._request_ids)
        work = tuple(
            Work(
                request_id=request_id,
                rows=picture.unet_rows,
                steps=admission.calls(picture.num_inference_steps, self._bounds.calls_per_step),
                width=request.width,
                height=request.height,
                batch_size=request.batch_size,
            )
            for picture in pictures
        )
        refusal = admission.refuse(
            work, self._pending.ahead(), speed, self._bounds, waited_s=waited_s
        )
        if refusal is not None:
            raise self._refused(refusal.reason, refusal.message, refusal.retry_after_s)
        return PendingRequest(work), process

    def _refused(
        self, reason: RefusalReason, message: str, retry_after_s: float | None
    ) -> UnavailableError | RequestError:
        self._refusals[reason] += 1
        if retry_after_s is None:
            return RequestError(message)
        return UnavailableError(message, retry_after_s)

    def _retry_after_s(self) -> float:
        """Return when to retry while there is no engine: about when the next one will be ready."""
        if self._state == "closing" or self._failure is not None:
            return _RETRY_OTHER_SERVER_S
        load_s = _LOAD_S if self._load_s is None else self._load_s
        passed_s = (
            time.monotonic() - self._restart_policy.started if self._state == "loading" else 0.0
        )
        return max(admission.SHORTEST_RETRY_S, load_s - passed_s)
