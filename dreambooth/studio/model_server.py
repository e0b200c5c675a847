"""Run the server for one run's model, in a process of its own with a folder that says it all.

Like a drawing it outlives the page, and a page that is loaded or started anew finds it, or finds
that it has died.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from dreambooth.errors import UserError
from dreambooth.process import files
from dreambooth.runs import run_folder
from dreambooth.runs.run_folder import Run
from dreambooth.runs.run_list import RunList
from dreambooth.studio.own_process import OwnProcess, object_of

FOLDER: Final = ".server"  # no run has such a name
PICTURE: Final = "picture.png"

_SERVED: Final = "served.json"
_ASKED: Final = "asked.json"
_ADDRESS: Final = re.compile(r"listening on http://127\.0\.0\.1:([0-9]{1,5})")
_LONGEST_ERROR: Final = 1 << 20
_LONGEST_REPLY: Final = 64 << 20
_PING_S: Final = 2.0
_REPLY_S: Final = 90.0  # the server itself gives up after 60 s
_ELSEWHERE: Final = "start the page with another --dir"


class ServerState(StrEnum):
    """What the server's process does."""

    NONE = "none"
    LOADING = "loading"
    READY = "ready"
    STOPPING = "stopping"
    STOPPED = "stopped"
    DIED = "died"


@dataclass(frozen=True, slots=True)
class ModelServer:
    """The server that the page starts, at most one for a list of runs."""

    runs: RunList

    @property
    def folder(self) -> Path:
        """Return where all that is known of it lies."""
        return self.runs.folder / FOLDER

    @property
    def process(self) -> OwnProcess:
        """Return its process."""
        return OwnProcess(self.folder)

    @property
    def run_name(self) -> str:
        """Return the run whose model is, or was last, served; "" before the first one."""
        found = object_of(self.folder / _SERVED).get("run")
        return found if isinstance(found, str) else ""

    @property
    def port(self) -> int | None:
        """Return its port, None before it listens."""
        found = _ADDRESS.search(self.process.log())
        return int(found[1]) if found else None

    def state(self) -> ServerState:
        """Return what it does; this asks a running one, which may take two seconds."""
        process = self.process
        if process.is_running:
            if process.was_stopped:
                return ServerState.STOPPING
            return ServerState.READY if self._answers() else ServerState.LOADING
        if not process.was_started:
            return ServerState.NONE
        return ServerState.STOPPED if process.was_stopped else ServerState.DIED

    def start(self, run: Run) -> None:
        """Start to serve a run's model on a free port. Raises UserError if one is served."""
        if not run.has_model():
            raise UserError(f"The run {run.name} has no model yet.")
        with files.disk_faults_named("The server's log", self.folder, elsewhere=_ELSEWHERE):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                if not files.try_lock(lock) or self.process.is_running:
                    raise UserError(
                        f"The model of {self.run_name or 'another run'} is being served: stop "
                        "that server first."
                    )
                self._start(run)
            finally:
                os.close(lock)

    def _start(self, run: Run) -> None:
        self.process.forget()
        for name in (_ASKED, PICTURE):
            (self.folder / name).unlink(missing_ok=True)
        files.write_whole(self.folder / _SERVED, json.dumps({"run": run.name}).encode())
        self.process.start(
            "serve",
            f"--model={os.path.abspath(run.folder / run_folder.MODEL)}",
            *("--host=127.0.0.1", "--port=0", "--log_level=info"),
        )

    def stop(self) -> None:
        """Tell it to end; it first finishes what it draws, for 25 seconds at most."""
        if self.process.was_started:
            self.process.stop()

    def ask(self, prompt: str, seed: str) -> None:
        """Ask it for one picture and keep the reply. Raises UserError with its own sentence."""
        if not (seed == "" or (seed.isascii() and seed.isdecimal() and len(seed) <= 20)):
            raise UserError("The seed must be a whole number, or be left out.")
        body = {"prompt": prompt, **({"seed": int(seed)} if seed else {})}
        headers = {"Content-Type": "application/json", "Accept": "image/png"}
        reply, facts = self._call("/invocations", json.dumps(body).encode(), headers)
        with files.disk_faults_named("The picture", self.folder, elsewhere=_ELSEWHERE):
            asked = {"prompt": prompt, "facts": facts.replace(";", ", ")}
            files.write_whole(self.folder / _ASKED, json.dumps(asked).encode())
            files.write_whole(self.folder / PICTURE, reply)

    def asked(self) -> tuple[str, str, int] | None:
        """Return the prompt of the picture that is kept, what its reply said, and its time."""
        found = object_of(self.folder / _ASKED)
        with contextlib.suppress(OSError):
            changed = (self.folder / PICTURE).stat().st_mtime_ns
            return str(found.get("prompt", "")), str(found.get("facts", "")), changed
        return None

    def _answers(self) -> bool:
        try:
            self._call("/ping", None, {}, timeout_s=_PING_S)
        except UserError:
            return False
        return True

    def _call(
        self, path: str, body: bytes | None, headers: dict[str, str], timeout_s: float = _REPLY_S
    ) -> tuple[bytes, str]:
        """Return a reply and SageMaker's header of it; raise UserError with what is wrong."""
        port = self.port
        if port is None or not self.process.is_running:
            raise UserError("No server runs that could answer: start it first.")
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, headers)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # not through a proxy
        try:
            with opener.open(request, timeout=timeout_s) as reply:
                facts = reply.headers.get("X-Amzn-SageMaker-Custom-Attributes", "")
                return reply.read(_LONGEST_REPLY), facts
        except urllib.error.HTTPError as error:
            with error, contextlib.suppress(ValueError, TypeError, KeyError, OSError):
                sentence = json.loads(error.read(_LONGEST_ERROR))["message"]
                raise UserError(f"The server answered {error.code}: {sentence}") from error
            raise UserError(f"The server answered {error.code}.") from error
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"The server did not answer ({error}): is it still there?") from error
