"""Processes that the page starts and that outlive it, each with a folder that says it all.

In the folder lie who it is, its log, and whether it was told to stop. All of it is read when it is
asked for, so that a page that is loaded or started anew finds the process, or that it has ended.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dreambooth.errors import DreamBoothError, one_line
from dreambooth.process import child_process, files
from dreambooth.process.identity import ProcessIdentity

_PROCESS: Final = "process.json"
_STOPPED: Final = "stopped"
_LOG: Final = "log.txt"
_LONGEST_FILE: Final = 1 << 20
_ERROR: Final = "error: "
_LONGEST_LINE: Final = 500

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OwnProcess:
    """The process of one folder, which runs a verb of ours."""

    folder: Path

    @property
    def is_running(self) -> bool:
        """Return whether it runs."""
        process = self._identity()
        return process is not None and process.is_running

    @property
    def was_started(self) -> bool:
        """Return whether there is, or was, a process."""
        return (self.folder / _PROCESS).exists()

    @property
    def was_stopped(self) -> bool:
        """Return whether it was told to stop."""
        return (self.folder / _STOPPED).exists()

    def start(self, *arguments: str, then: Callable[[], None] | None = None) -> None:
        """Start `python -m dreambooth` with these arguments. Raises OSError.

        then: called in a thread once it has ended, if this process lives so long.
        """
        with (self.folder / _LOG).open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "dreambooth", *arguments],
                env=child_process.environment(os.environ),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # it outlives the page
            )
        identity = json.dumps(ProcessIdentity.of(process.pid).as_json())
        files.write_whole(self.folder / _PROCESS, identity.encode())
        if self.was_stopped:  # before it could be named
            process.terminate()

        def wait() -> None:
            process.wait()  # in a process that lives on it must not stay a zombie
            if then is not None:
                try:
                    then()
                except DreamBoothError as error:
                    log.warning("after process %d: %s", process.pid, error)

        threading.Thread(target=wait, name="own process", daemon=True).start()

    def stop(self) -> None:
        """Send it SIGTERM if it runs; remember that it is to end, or never to begin."""
        process = self._identity()
        if process is None or process.is_running:
            (self.folder / _STOPPED).touch()
        if process is not None:
            process.send(signal.SIGTERM)

    def forget(self) -> None:
        """Let the folder be that of no process, before another one is started. Raises OSError."""
        for name in (_PROCESS, _STOPPED):
            (self.folder / name).unlink(missing_ok=True)

    def log(self) -> str:
        """Return the log, of a very long one the beginning."""
        return text_of(self.folder / _LOG)

    def last_line(self) -> str:
        """Return the last line of the log, "" without one."""
        return one_line(["", *self._last_lines()][-1], _LONGEST_LINE)

    def fault(self) -> str:
        """Return the last error in the log as a sentence, "" without one."""
        lines = [line for line in self._last_lines() if line[: len(_ERROR)] == _ERROR]
        return one_line(lines[-1].removeprefix(_ERROR), _LONGEST_LINE) if lines else ""

    def _last_lines(self) -> list[str]:
        lines = text_of(self.folder / _LOG, from_end=True).splitlines()
        return [line for line in lines if line.strip()]

    def _identity(self) -> ProcessIdentity | None:
        return ProcessIdentity.from_json(object_of(self.folder / _PROCESS))


def text_of(path: Path, *, from_end: bool = False) -> str:
    """Return a file's text, "" where there is none; of a very long one the beginning or the end."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        if from_end:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LONGEST_FILE))
        return file.read(_LONGEST_FILE).decode("utf-8", "replace")
    return ""


def object_of(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, an empty one where there is none."""
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(text_of(path))
        return found if isinstance(found, dict) else {}
    return {}
