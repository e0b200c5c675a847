"""Run the process that owns the engine and torch: `python -m dreambooth.serving.supervision.child`.

It is started by `engine_process`, which passes the number of an inherited socket. When that is
closed, nobody waits for pictures any more, and the process exits at once, whatever it is doing.
SIGTERM, SIGINT and SIGHUP are ignored: they reach every process of a container or terminal, but the
accepted requests are still to be drawn. The server sends Close when that is done.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dreambooth.errors import DreamBoothError
from dreambooth.process import child_process, gpu_driver, libraries, logs
from dreambooth.serving.contract.engine_status import EngineStatus
from dreambooth.serving.contract.reply import Picture
from dreambooth.serving.supervision.link import SendQueue, read_blocking
from dreambooth.serving.supervision.messages import (
    Cancel,
    Done,
    Drawn,
    Failed,
    Fault,
    Generate,
    LoadFailed,
    Ready,
    WireError,
)
from dreambooth.settings.serve_options import ServeSettings

if TYPE_CHECKING:
    from dreambooth.serving.engine.drawing_jobs import DrawingJob
    from dreambooth.serving.engine.engine import Engine

STATUS_S: Final = 0.5
# When several requests end at about the same time, one status covers them all.
_SHORTEST_STATUS_S: Final = 0.02
_FLUSH_S: Final = 5.0

log = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> int:
    """Serve one socket; return 0 after Close, 1 after a failed load or if the engine is broken."""
    logs.open_closed_streams()
    arguments = _parser().parse_args(argv)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # Or when the socket stays open although the parent has ended.
    child_process.die_with_parent()
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries that print
    os.set_inheritable(arguments.fd, False)
    with logs.non_blocking_streams() as dropped_lines:
        logs.to_stderr(arguments.settings.log_level)
        child = _Child(socket.socket(fileno=arguments.fd), dropped_lines)
        return child.run(arguments.model, arguments.settings)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dreambooth.serving.supervision.child")
    parser.add_argument("--fd", type=int, required=True, help="number of the inherited socket")
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--settings", type=_settings, required=True, help="ServeSettings in JSON")
    return parser


def _settings(text: str) -> ServeSettings:
    return ServeSettings(**json.loads(text))


class _Child:
    """Serves the engine on a socket; one thread reads, one writes, one queues status messages."""

    def __init__(self, connection: socket.socket, dropped_lines: Callable[[], int]) -> None:
        self._connection = connection
        self._dropped_lines = dropped_lines
        self._send_queue = SendQueue(connection)
        self._engine: Engine | None = None
        self._jobs: dict[int, DrawingJob] = {}
        self._changed = threading.Event()  # a status is due
        self._ended = threading.Event()
        self._code = 0

    def run(self, folder: Path, settings: ServeSettings) -> int:
        """Load the engine, serve it and return the exit code.

        The status messages begin before torch is imported.
        """
        for work in (self._read, self._send):
            threading.Thread(target=work, name=work.__name__, daemon=True).start()
        try:
            engine = _open(folder, settings)
        except Exception as error:  # the child's border: every error becomes a message
            if not isinstance(error, DreamBoothError):
                log.exception("the engine cannot be opened")
            self._send_queue.put(LoadFailed(fault=Fault.of(error)))
            self._send_queue.close(_FLUSH_S)
            return 1
        gc.collect()
        gc.freeze()  # the model stays, so no collection need scan it
        self._engine = engine
        self._send_queue.put(_ready(engine))
        self._changed.set()
        self._ended.wait()
        if self._code == 0:
            engine.close(drain=False)
        self._send_queue.close(_FLUSH_S)
        return self._code

    def _end(self, code: int) -> None:
        self._code = code
        self._ended.set()

    def _read(self) -> None:
        while not self._ended.is_set():
            try:
                message = read_blocking(self._connection)
            except WireError:
                log.exception("the server sent a malformed message")
                logs.write_last_lines()
                message = None
            if message is None:  # the server is gone, so nobody wants the unfinished work
                os._exit(1)
            if isinstance(message, Generate):
                self._generate(message)
            elif isinstance(message, Cancel):
                job = self._jobs.get(message.request_id)
                if job is not None:
                    job.cancel()
            else:
                self._end(0)

    def _generate(self, message: Generate) -> None:
        number = message.request_id
        try:
            assert self._engine is not None  # nothing is requested before Ready
            job = self._engine.submit(
                message.pictures,
                most_pictures=message.batch_size,
                on_picture=partial(self._drawn, number),
            )
        except Exception as error:  # a request's border: it fails alone
            self._failed(number, error)
            return
        self._jobs[number] = job
        job.add_done_callback(partial(self._done, number))

    def _drawn(self, number: int, index: int, picture: Picture) -> None:
        self._send_queue.put(Drawn(request_id=number, index=index, picture=picture))

    def _done(self, number: int, job: DrawingJob) -> None:
        self._jobs.pop(number, None)
        try:
            job.result(timeout=0)
        except CancelledError:
            log.debug("request %d was cancelled", number)
        except Exception as error:  # of the job, whatever it is
            self._failed(number, error)
        else:
            self._send_queue.put(Done(request_id=number))
        self._changed.set()

    def _failed(self, number: int, error: Exception) -> None:
        if not isinstance(error, DreamBoothError):
            log.error("request %d failed in the engine", number, exc_info=error)
        self._send_queue.put(Failed(request_id=number, fault=Fault.of(error)))

    def _send(self) -> None:
        """Send a status about twice a second and whenever a request has ended."""
        while not self._ended.is_set():
            self._changed.wait(STATUS_S)
            self._ended.wait(_SHORTEST_STATUS_S)
            self._changed.clear()
            status = EngineStatus() if self._engine is None else self._engine.status()
            self._send_queue.put(
                replace(status, dropped_lines_total=self._dropped_lines(), rss_bytes=_rss_bytes())
            )
            if self._engine is not None and self._engine.broken is not None:
                log.error("the engine is broken and its process ends: %s", self._engine.broken)
                self._end(1)


def _open(folder: Path, settings: ServeSettings) -> Engine:
    with libraries.importing():
        import torch

        from dreambooth.serving.engine.engine import open_engine

    if settings.device == "auto" and not torch.cuda.is_available():
        unused = gpu_driver.why_unused(
            os.environ,
            gpu_driver.inspect_machine(),
            torch_version=torch.__version__,
            cuda_version=torch.version.cuda,
        )
        if unused is not None:
            log.warning("%s", unused)
    return open_engine(folder, settings)


def _ready(engine: Engine) -> Ready:
    return Ready(
        seconds_per_call=engine.warm_up.seconds_per_call,
        seconds_per_decode=engine.warm_up.seconds_per_decode,
        rows=engine.warm_up.rows,
    )


def _rss_bytes() -> int:
    """Return the resident memory of this process, 0 if the system does not report it."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    code = main(sys.argv[1:])
    logging.shutdown()
    # Not sys.exit: after the loss of a device its libraries may never finish.
    os._exit(code)
