"""Run the server's process: its socket, its signals, and the order of start and end, without torch.

The port is bound before the model is read, so that /ping can answer 503 while it loads. If the
model cannot be loaded, the process ends with one sentence in the log, since such an endpoint can
never work. Crashes of the engine are left to the supervisor.

After SIGTERM, SIGINT or SIGHUP new requests get 503. The accepted ones are drawn and sent within
`GRACE_S`, then the port is closed and the process ends with 0. SageMaker sends SIGKILL 30 s after
SIGTERM (AWS, "Custom inference code": how SageMaker stops a container).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import math
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import uvicorn

from dreambooth.errors import DreamBoothError, UserError
from dreambooth.model_folder import source
from dreambooth.process import logs, stop, temporary_folder
from dreambooth.serving.http.app import App
from dreambooth.serving.http.guard import Guard, GuardLimits, guarded
from dreambooth.serving.http.metrics import Metrics
from dreambooth.serving.supervision.messages import EngineFaultError
from dreambooth.serving.supervision.supervisor import Supervisor
from dreambooth.settings.serve_options import ServeSettings

GRACE_S: Final = 25.0
# Additional seconds, to encode the last picture and to write what clients have not read yet.
_ENCODE_S: Final = 1.5
_FLUSH_S: Final = 2
_SHUTDOWN_LIMIT_S: Final = 28.0
_BACKLOG: Final = 2_048
# Open files besides the connections: the log, pipes, the listener, and what is open for a moment
# while a model is unpacked or an engine is started.
_RESERVED_FILES: Final = 40
_LEAST_FILES: Final = 48
_WANTED_FILES: Final = 65_536
# Connections that are accepted at once. About so many again are being opened, told and closed.
_ACCEPTED_AT_ONCE: Final = 64
_IN_BETWEEN: Final = 4
_NO_RESOURCES: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

log = logging.getLogger(__name__)


def run(settings: ServeSettings) -> int:
    """Serve until a signal comes; return 0, or 1 for a model that cannot be loaded.

    Raises UserError if the address cannot be listened on or too few files can be opened, and
    ResourceError if there is no temporary folder.
    """
    with logs.non_blocking_streams() as dropped_lines:
        logs.to_stderr(settings.log_level)
        logging.getLogger("uvicorn").setLevel(logging.ERROR)
        metrics = Metrics()
        metrics.dropped_lines = dropped_lines
        files = _raise_file_limit()
        with temporary_folder.temporary() as folder, _listen(settings) as listener:
            return asyncio.run(_serve(settings, metrics, listener, folder, files))


async def _serve(
    settings: ServeSettings, metrics: Metrics, listener: socket.socket, workspace: Path, files: int
) -> int:
    app = App(settings, metrics)
    guard = Guard(guard_limits(settings.max_connections, files))
    http = _HttpServer(_config(app, guard, accepted_at_once(files)))
    metrics.connections = lambda: (len(http.server_state.connections), guard.refused)
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(LoopErrors())
    for number in stop.answered(always=(signal.SIGTERM, signal.SIGINT)):
        loop.add_signal_handler(number, asked.set)
    serving = asyncio.create_task(http.serve(sockets=[listener]))
    stopped = asyncio.create_task(asked.wait())
    host, port = listener.getsockname()[:2]
    log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
    drawing = asyncio.create_task(_run_engine(app, metrics, settings, workspace))
    await asyncio.wait({drawing, stopped, serving}, return_when=asyncio.FIRST_COMPLETED)
    code = _exit_code(drawing)
    began = time.monotonic()
    await _close(app, metrics, drawing, stopped)
    # Clients that read slowly get the rest of the time before SageMaker sends SIGKILL.
    left = _SHUTDOWN_LIMIT_S - (time.monotonic() - began)
    http.config.timeout_graceful_shutdown = max(_FLUSH_S, int(left))
    http.should_exit = True
    await serving
    return code


def _exit_code(drawing: asyncio.Task[None]) -> int:
    """Return the exit code, 1 if the model could not be served; log the reason then."""
    if not drawing.done():
        return 0
    error = drawing.exception()
    if error is None:
        return 0
    if isinstance(error, (DreamBoothError, EngineFaultError)):
        log.error("the model cannot be served: %s", error)
    else:
        log.error("the model cannot be served", exc_info=error)
    return 1


async def _run_engine(app: App, metrics: Metrics, settings: ServeSettings, workspace: Path) -> None:
    """Fetch the model's folder, and keep an engine running on it until cancelled.

    Raises DreamBoothError or EngineFaultError if no engine can be loaded, now or later.
    """
    folder = await _fetch(settings, workspace)
    supervisor = Supervisor(folder, settings)
    metrics.status = supervisor.status
    app.supervisor = supervisor
    await supervisor.start()
    # These objects stay in use: garbage collections, which delay requests, need not scan them.
    gc.collect()
    gc.freeze()
    await supervisor.wait_until_given_up()


async def _close(
    app: App, metrics: Metrics, drawing: asyncio.Task[None], stopped: asyncio.Task[bool]
) -> None:
    """Refuse new requests, and draw, encode and send the accepted ones."""
    log.info("shutting down: %d requests are finished first", metrics.requests_in_flight)
    app.closing = True
    for task in (drawing, stopped):
        task.cancel()
    await asyncio.gather(drawing, stopped, return_exceptions=True)
    end = time.monotonic() + GRACE_S + _ENCODE_S
    if isinstance(app.supervisor, Supervisor):
        await app.supervisor.close(GRACE_S)
    while metrics.requests_in_flight and time.monotonic() < end:
        await asyncio.sleep(0.01)
    app.close()


async def _fetch(settings: ServeSettings, workspace: Path) -> Path:
    """Find, unpack or download the model, in a daemon thread that delays no shutdown."""
    loop = asyncio.get_running_loop()
    fetched: asyncio.Future[Path] = loop.create_future()

    def settle(folder: Path | None, error: BaseException | None) -> None:
        if fetched.done():  # cancelled meanwhile
            return
        if folder is not None:
            fetched.set_result(folder)
        elif error is not None:
            fetched.set_exception(error)

    def work() -> None:
        folder, fault = None, None
        try:
            folder = _folder_of(settings, workspace)
        except Exception as error:  # it is raised again in the loop that waits
            fault = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, folder, fault)

    threading.Thread(target=work, name="fetch", daemon=True).start()
    return await fetched


def _folder_of(settings: ServeSettings, workspace: Path) -> Path:
    is_platforms = settings.model_is_platforms
    found = source.locate(
        None if is_platforms else settings.model,
        Path(settings.model) if is_platforms else None,
        given="as the endpoint's model data or with --model" if is_platforms else "with --model",
        prediction_type=settings.prediction_type,
        base=settings.base,
    )
    return source.open_source(found, workspace)


class _HttpServer(uvicorn.Server):
    """A uvicorn server without its own signal handling, which would close the port at once."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept `backlog` connections at once, and let `_BACKLOG` of them wait in the system."""
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(_BACKLOG)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _config(app: App, guard: Guard, backlog: int) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=guarded(guard),
        interface="asgi3",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=backlog,
        timeout_keep_alive=guard.limits.idle_s,
        timeout_graceful_shutdown=_FLUSH_S,
    )


def _listen(settings: ServeSettings) -> socket.socket:
    host, port = settings.host, settings.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"Port {port} of {host} cannot be listened on ({reason}): choose others with --port "
            "and --host."
        ) from error


def _raise_file_limit() -> int:
    """Allow `_WANTED_FILES` open files, or as many as the system permits; return the number.

    Raises UserError if they are too few for any connection.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    most = _WANTED_FILES if hard == unlimited else min(_WANTED_FILES, hard)
    if soft != unlimited and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    files = _WANTED_FILES if soft == unlimited else soft
    if files < _LEAST_FILES:
        raise UserError(
            f"The system lets this process open {files} files, and the server needs "
            f"{_LEAST_FILES}: raise the limit (`ulimit -n`)."
        )
    return files


def accepted_at_once(files: int) -> int:
    """Return how many connections may be accepted in one turn of the event loop."""
    return max(1, min(_ACCEPTED_AT_ONCE, (files - _RESERVED_FILES) // 16))


def guard_limits(max_connections: int, files: int) -> GuardLimits:
    """Return limits with which all connections together never need more than `files` open files."""
    spare = files - _RESERVED_FILES
    lingering = min(GuardLimits().lingering, spare // 4)
    most = spare - lingering - _IN_BETWEEN * accepted_at_once(files)
    return GuardLimits(connections=min(max_connections, most), lingering=lingering)


class LoopErrors:
    """Handles the event loop's errors: that nothing can be accepted is one line a second at most.

    asyncio reports each connection that it could not accept, and tries again after a second.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._shown_at = -math.inf

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Handle one error, as asyncio's `set_exception_handler` says."""
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in _NO_RESOURCES:
            loop.default_exception_handler(context)
        elif self._clock() - self._shown_at >= 1.0:
            self._shown_at = self._clock()
            log.warning("new connections wait: the system lacks resources (%s)", error.strerror)
