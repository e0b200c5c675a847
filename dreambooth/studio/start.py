"""Start the studio: bind its port, build the page and serve it until a signal comes."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import signal
import socket
from collections.abc import Iterator
from typing import Final

import uvicorn

from dreambooth.errors import UserError
from dreambooth.process import files, stop
from dreambooth.runs.run_list import RunList
from dreambooth.settings.studio_options import StudioSettings, is_loopback
from dreambooth.studio.access import Access

_CLOSE_S: Final = 2  # browsers keep their websockets open

log = logging.getLogger(__name__)


def run(settings: StudioSettings) -> int:
    """Serve the page; return 0 once a signal has ended it.

    Raises UserError where the page's library is missing or the port is taken.
    """
    if importlib.util.find_spec("nicegui") is None:
        raise UserError(
            "The studio page needs NiceGUI, which is not installed: run `make studio`, or "
            "`python -m pip install -r requirements/studio.txt`."
        )
    from dreambooth.studio import pages

    elsewhere = "give another folder with --dir"
    with files.disk_faults_named("The list of runs", settings.dir, elsewhere=elsewhere):
        settings.dir.mkdir(parents=True, exist_ok=True)
    with _listen(settings) as listener:
        app = Access(
            pages.build(RunList(settings.dir.absolute()), settings.model),
            password=settings.password,
        )
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=_CLOSE_S,
        )
        _say_where(settings, listener)
        logging.getLogger("uvicorn").setLevel(logging.ERROR)
        asyncio.run(_serve(_Server(config), listener))
    return 0


class _Server(uvicorn.Server):
    """A uvicorn server without its own signal handling, which ends with the signal, not with 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(server: uvicorn.Server, listener: socket.socket) -> None:
    def end() -> None:
        if server.should_exit:  # a second signal: what is broken off is no fault
            server.force_exit = True
            logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
        server.should_exit = True

    for number in stop.answered(always=(signal.SIGTERM, signal.SIGINT)):
        asyncio.get_running_loop().add_signal_handler(number, end)
    await server.serve(sockets=[listener])


def _listen(settings: StudioSettings) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM
        )[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise UserError(
            f"The page cannot listen on {settings.host}, port {settings.port} "
            f"({error.strerror or error}): give another --port."
        ) from error


def _say_where(settings: StudioSettings, listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    print(f"The studio is at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    if is_loopback(host):
        print(
            f"From another machine: ssh -L {port}:127.0.0.1:{port} THIS_MACHINE, then "
            f"http://127.0.0.1:{port} there.",
            flush=True,
        )
    else:
        log.warning(
            "the password and the pictures travel without encryption: let only a trusted network "
            "reach this port, or put a proxy with TLS before it"
        )
