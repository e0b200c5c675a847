"""Write what the trainer itself says of its run: who trains it, with what, and how it ended.

The room for the last word is taken on the disk at the start, so that a disk that is full in the end
does not make a failed run look as if it had been killed. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from dreambooth.errors import UserError, one_line
from dreambooth.process import failure, files, logs
from dreambooth.process.identity import ProcessIdentity
from dreambooth.runs import run_folder
from dreambooth.runs.run_folder import Run

log = logging.getLogger(__name__)

LOCK_VARIABLE: Final = "DREAMBOOTH_RUN_LOCK"
"""Names the descriptor of the lock that the runner has taken for its trainer."""

_LAST_WORD: Final = ".last-word"
_ROOM_BYTES: Final = 4096
_ELSEWHERE: Final = "give another folder with --run_dir"
_WAIT_S: Final = 1.0


class Record:
    """What one trainer writes into the folder of its run; nothing without a folder.

    From `begin` to `close` it holds the lock of the run, and stdout and stderr are also written to
    the log. is_process: whether the process ends with the job; then it keeps the lock until it is
    gone, with all the memory that it holds.
    """

    def __init__(
        self, folder: Path | None, environ: Mapping[str, str], *, is_process: bool = False
    ) -> None:
        self._run = None if folder is None else Run(folder)
        number = environ.get(LOCK_VARIABLE, "")
        self._inherited = int(number) if number.isdecimal() and len(number) < 9 else None
        self._is_process = is_process
        self._writes = False
        self._undo = contextlib.ExitStack()
        self._ending = threading.Lock()
        self._has_ended = False

    def begin(self) -> None:
        """Take the run. Raises UserError where another process trains it."""
        if self._run is None:
            return
        folder = self._run.folder
        with files.disk_faults_named("The run", folder, elsewhere=_ELSEWHERE):
            folder.mkdir(parents=True, exist_ok=True)
            lock = self._run.take(self._inherited)
            if lock is None:
                raise UserError(
                    f"Another process trains the run {one_line(str(folder), 300)}: wait until it "
                    f"ends, or {_ELSEWHERE}."
                )
            if not self._is_process:
                self._undo.callback(os.close, lock)
            for name in (run_folder.EXIT_CODE, run_folder.FAILURE, run_folder.STOPPING):
                (folder / name).unlink(missing_ok=True)
            self._writes = True
            files.write_whole(folder / _LAST_WORD, b" " * _ROOM_BYTES)
            mark_begun(self._run, os.getpid())
            self._undo.enter_context(logs.copied_into(folder / run_folder.LOG))

    def settings(self, settings: Mapping[str, object]) -> None:
        """Store what the run is asked to do, also if it is wrong."""
        if self._run is not None and self._writes:
            with files.disk_faults_named("The run", self._run.folder, elsewhere=_ELSEWHERE):
                self._run.write_settings(settings)

    def plan(self, steps: int, rows: Sequence[tuple[str, str]]) -> None:
        """Store the number of steps and the rows of the training plan."""
        if self._run is not None and self._writes:
            text = json.dumps({"steps": steps, "rows": rows}, indent=2) + "\n"
            with files.disk_faults_named("The run", self._run.folder, elsewhere=_ELSEWHERE):
                files.write_whole(self._run.folder / run_folder.PLAN, text.encode("utf-8"))

    def failed(self, error: BaseException) -> None:
        """Store why the run failed, as the failure file of the platform says it."""
        self._end(run_folder.FAILURE, failure.describe_failure(error))

    def ended(self, code: int) -> None:
        """Store the exit code, unless it is stored, or a failure is."""
        self._end(run_folder.EXIT_CODE, f"{code}\n")

    def leave(self, code: int) -> None:
        """End the process at once, from any thread, but let it say so first."""
        self.ended(code)
        os._exit(code)

    def close(self) -> None:
        """End the copy of the streams, and let go of the run unless the process ends now."""
        self._undo.close()

    def _end(self, name: str, text: str) -> None:
        """Write the one file that says how the run ended, in the room that is kept for it."""
        if self._run is None or not self._writes or not self._ending.acquire(timeout=_WAIT_S):
            return
        folder, content = self._run.folder, text.encode("utf-8")
        try:
            if not self._has_ended:
                with (folder / _LAST_WORD).open("r+b") as room:
                    room.write(content)
                    room.truncate()
                files.put_in_place(folder / _LAST_WORD, folder / name)
                self._has_ended = True
        except FileNotFoundError:  # the disk was full at the start, and that is what is said
            pass
        except OSError as error:  # then it looks as if the trainer had been killed
            log.warning("%s cannot be written: %s", folder / name, error.strerror or error)
        finally:
            self._ending.release()


def mark_begun(run: Run, pid: int) -> None:
    """Store which process trains the run. Raises OSError."""
    found = {**ProcessIdentity.of(pid).as_json(), "begun_at": time.time()}
    content = json.dumps(found, indent=2) + "\n"
    files.write_whole(run.folder / run_folder.PROCESS, content.encode("utf-8"))
