"""Read the folder of a run: what it is asked to do, how far it is, and the state it is in.

The trainer holds a lock in the folder as long as it lives, and leaves one file that says how it
ended. The state is derived from these whenever it is asked for, and stored nowhere. The first row
that fits counts::

    running   the lock is held
    done      the exit code is 0
    failed    there is a failure file
    stopped   the exit code is 143, 130 or 129, or 137: it did not stop in time and was killed
    died      a trainer has begun, and left neither of these: it was killed, or power was lost
    waiting   there are settings
    draft     there are only settings that nobody has sent off yet

Neither process ids nor clocks count: a copied folder is not running, and a process that was given
the id of a dead trainer is no trainer. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO, Final

from dreambooth.errors import ResourceError, UserError, one_line
from dreambooth.process import addresses, files
from dreambooth.process.identity import ProcessIdentity
from dreambooth.settings.container import RUN_FOLDERS
from dreambooth.settings.knob import unwrapped

LOCK: Final = "lock"  # empty; whoever trains the run holds its lock
PROCESS: Final = "process.json"  # who has trained last, for people and for a stop signal
SETTINGS: Final = "settings.json"
DRAFT: Final = "draft.json"
PLAN: Final = "plan.json"
LOG: Final = "log.txt"
EXIT_CODE: Final = "exit_code"
FAILURE: Final = "failure"
STOPPING: Final = "stopping"  # empty; the trainer was sent a stop signal
METRICS: Final = "metrics.jsonl"
SAMPLES: Final = "samples"
METER: Final = "meter"
REPORT: Final = "report.html"
PICTURES: Final = "pictures"  # a training folder inside the run
MODEL: Final = RUN_FOLDERS["model_dir"]
CHECKPOINTS: Final = RUN_FOLDERS["checkpoint_dir"]
STATES: Final = "states"  # beside the checkpoints

KILLED: Final = 137
"""The exit code of a trainer that a stop has killed."""

_STOPPED: Final = (143, 130, 129, KILLED)
_PATHS: Final = ("pretrained_model", "base", "fid_features")
_LOOK_AT_LOCK: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
_OPEN_LOCK: Final = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
_PATIENCE_S: Final = 1.0
_LONGEST_LINE: Final = 16_384
_LONGEST_FILE: Final = 4 * 2**20
_MOST_DIGITS: Final = 20


class RunState(StrEnum):
    """The state of a run; the module's docstring is its table."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    STOPPED = "stopped"
    DIED = "died"
    WAITING = "waiting"
    DRAFT = "draft"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSizes:
    """The bytes of a run on the disk. rest: metrics, samples, pictures, log and all others."""

    model: int
    checkpoints: int
    rest: int

    @property
    def total(self) -> int:
        """Return the bytes that a deleted run frees."""
        return self.model + self.checkpoints + self.rest


@dataclass(frozen=True, slots=True)
class Run:
    """The run in one folder; everything is read from the disk when it is asked for."""

    folder: Path

    @property
    def name(self) -> str:
        """Return the name of the folder."""
        return self.folder.name

    @property
    def exists(self) -> bool:
        """Return whether the folder is that of a run."""
        names = (LOCK, SETTINGS, DRAFT, PROCESS)
        return any(os.path.isfile(self.folder / name) for name in names)

    def state(self) -> RunState:
        """Return the state. Raises UserError if there is no run, ResourceError without locks."""
        while True:
            with self._looking() as lock:
                if lock == "held":
                    return RunState.RUNNING
                found = self.state_without_a_trainer()
            # Without the file a trainer may have begun while the others were read.
            if lock == "free" or not (self.folder / LOCK).exists():
                break
        if found is None:
            raise UserError(f"{one_line(str(self.folder), 300)} is no folder of a run.")
        return found

    def state_without_a_trainer(self) -> RunState | None:
        """Return the state that the files say, None if there are none; the lock is not asked."""
        code = self.exit_code()
        if code == 0:
            return RunState.DONE
        if (self.folder / FAILURE).is_file():
            return RunState.FAILED
        if code in _STOPPED:
            return RunState.STOPPED
        if code is not None:
            return RunState.FAILED
        if (self.folder / PROCESS).is_file():
            return RunState.DIED
        if (self.folder / SETTINGS).is_file():
            return RunState.WAITING
        if (self.folder / DRAFT).is_file():
            return RunState.DRAFT
        return RunState.DIED if (self.folder / LOCK).is_file() else None

    @contextlib.contextmanager
    def _looking(self) -> Iterator[str]:
        """Yield "held", "free" or "absent"; during the block no trainer begins or ends a run."""
        try:
            descriptor = os.open(self.folder / LOCK, _LOOK_AT_LOCK)
        except FileNotFoundError:
            yield "absent"
            return
        except OSError as error:
            raise self._no_lock(error) from error
        try:
            try:
                is_free = files.try_lock(descriptor, shared=True)
            except OSError as error:
                raise self._no_lock(error) from error
            yield "free" if is_free else "held"
        finally:
            os.close(descriptor)

    @property
    def is_running(self) -> bool:
        """Return whether a trainer holds the lock of the run."""
        with self._looking() as lock:
            return lock == "held"

    @contextlib.contextmanager
    def changing(self) -> Iterator[RunState]:
        """Keep trainers and other changes away during the block, and yield the state.

        Raises UserError where a trainer runs it.
        """
        with contextlib.ExitStack() as undo:
            try:
                folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
                undo.callback(os.close, folder)
                is_free = files.try_lock(folder, patience_s=_PATIENCE_S)
                # Shared, as looking is: a change must not pass for a trainer.
                lock = os.open(self.folder / LOCK, _OPEN_LOCK, 0o644)
                undo.callback(os.close, lock)
                is_free = files.try_lock(lock, shared=True) and is_free
            except OSError as error:
                raise self._no_lock(error) from error
            if not is_free:
                raise UserError(f"The run {self.name} is running: stop it first.")
            found = self.state_without_a_trainer()
            if found is None:
                raise UserError(f"{one_line(str(self.folder), 300)} is no folder of a run.")
            yield found

    def take(self, inherited: int | None = None) -> int | None:
        """Return a descriptor that holds the lock until it is closed, None if another has it.

        No child process inherits it. inherited: a descriptor that a parent of ours has locked.
        """
        path = self.folder / LOCK
        try:
            if inherited is None or not _is_open_as(inherited, path):
                descriptor = os.open(path, _OPEN_LOCK, 0o644)
            else:
                descriptor = inherited
                os.set_inheritable(descriptor, False)
            has_it = files.try_lock(descriptor, patience_s=_PATIENCE_S)
        except OSError as error:
            raise self._no_lock(error) from error
        if has_it and _is_open_as(descriptor, path):  # else it was deleted meanwhile
            return descriptor
        os.close(descriptor)
        return None

    def _no_lock(self, error: OSError) -> ResourceError:
        if files.is_disk_full(error):
            elsewhere = "keep runs on a larger disk"
            return files.disk_fault("The run", self.folder, error, elsewhere=elsewhere)
        return ResourceError(
            f"The run {one_line(str(self.folder), 300)} cannot be locked "
            f"({error.strerror or error}): keep runs in a folder of a local disk that is yours."
        )

    def exit_code(self) -> int | None:
        """Return the exit code that the trainer left, None without one."""
        text = _text(self.folder / EXIT_CODE).strip()
        return int(text) if text.isascii() and text.isdigit() and len(text) <= 3 else None

    def failure(self) -> str:
        """Return the sentence that a failed run left, "" without one."""
        return " ".join(_text(self.folder / FAILURE).split())

    def settings(self) -> dict[str, object]:
        """Return what the run is asked to do, by the names of options and hyperparameters.

        Paths are whole: inside the folder they are stored relative to it.
        """
        found = _object(self.folder / SETTINGS)
        train = found.get("train")
        if isinstance(train, str) and train and not addresses.is_remote(train):
            found["train"] = os.path.join(os.path.abspath(self.folder), train)
        return found

    def write_settings(self, settings: Mapping[str, object]) -> None:
        """Store what the run is asked to do. Raises OSError."""
        files.write_whole(self.folder / SETTINGS, _as_bytes(self._located(settings)))

    def _located(self, settings: Mapping[str, object]) -> dict[str, object]:
        """Return the settings with paths that mean the same in every working folder."""
        found, folder = dict(settings), os.path.abspath(self.folder)
        for name in ("train", *_PATHS):
            value = found.get(name)
            text = unwrapped(value) if isinstance(value, str) else None
            if not text or text == "tiny":
                continue
            try:
                path = os.path.abspath(addresses.to_path(text, name))
            except UserError:  # the job will say so
                continue
            if name == "train" and Path(path).is_relative_to(folder) and path != folder:
                found[name] = os.path.relpath(path, folder)
            elif name == "train" or os.path.exists(path):  # a model may be a hub id as well
                found[name] = path
        return found

    def draft(self) -> dict[str, Any]:
        """Return the contents of the form of which the run is made; any JSON object."""
        return _object(self.folder / DRAFT)

    def save_draft(self, contents: Mapping[str, object]) -> None:
        """Store the contents of a form, as they are. Raises OSError."""
        with self.changing():
            self.write_draft(contents)

    def write_draft(self, contents: Mapping[str, object]) -> None:
        """Store the contents of a form in a folder that nobody else knows yet. Raises OSError."""
        files.write_whole(self.folder / DRAFT, _as_bytes(contents))

    def process(self) -> ProcessIdentity | None:
        """Return the process that trained the run last, None before the first one."""
        return ProcessIdentity.from_json(_object(self.folder / PROCESS))

    def is_told_to_stop(self) -> bool:
        """Return whether the trainer that runs or has run last was sent a stop signal."""
        return (self.folder / STOPPING).exists()

    def begun_at(self) -> float | None:
        """Return when the last trainer began, in seconds since 1970 by the clock of then."""
        found = _object(self.folder / PROCESS).get("begun_at")
        return float(found) if isinstance(found, int | float) else None

    def planned_steps(self) -> int | None:
        """Return how many steps the trainer has planned, None before there is a plan."""
        found = _object(self.folder / PLAN).get("steps")
        return found if isinstance(found, int) else None

    def plan(self) -> list[tuple[str, str]]:
        """Return the training plan as rows of name and text, none before there is one."""
        rows = _object(self.folder / PLAN).get("rows")
        pairs = rows if isinstance(rows, list) else []
        pairs = [row for row in pairs if isinstance(row, list) and len(row) == 2]
        return [(str(name), str(text)) for name, text in pairs]

    def last_metrics(self) -> dict[str, Any]:
        """Return the last whole line of the metrics, an empty dictionary without one."""
        lines = _tail(self.folder / METRICS, _LONGEST_LINE).split("\n")
        for line in reversed(lines[:-1]):  # the last one has not been written to its end
            with contextlib.suppress(ValueError, RecursionError):
                found = _from_json(line)
                if isinstance(found, dict) and isinstance(found.get("step"), int):
                    return found
        return {}

    def log_tail(self, lines: int = 50) -> list[str]:
        """Return the last lines of the log."""
        return _tail(self.folder / LOG, 300 * lines).splitlines()[-lines:]

    def samples(self) -> list[Path]:
        """Return the sample pictures, in the order of their steps."""
        return sorted((self.folder / SAMPLES).glob("step-*.png"))

    def has_model(self) -> bool:
        """Return whether there is a whole model, be it of all steps or of a stopped run."""
        return os.path.isfile(self.folder / MODEL / "model_index.json")

    def model_info(self) -> dict[str, Any]:
        """Return what the model says of itself: any JSON object, an empty one without a model."""
        return _object(self.folder / MODEL / "__model_info__.json") if self.has_model() else {}

    def checkpoint_step(self) -> int | None:
        """Return the step of the newest checkpoint, None without one."""
        steps = [
            int(path.parent.name.removeprefix("step-"))
            for path in (self.folder / CHECKPOINTS).glob("step-*/manifest.json")
            if path.parent.name.removeprefix("step-").isdecimal()
        ]
        return max(steps, default=None)

    def sizes(self) -> RunSizes:
        """Return how much of the disk the run takes."""
        model, checkpoints = (_size(self.folder / name) for name in (MODEL, CHECKPOINTS))
        return RunSizes(
            model=model,
            checkpoints=checkpoints,
            rest=max(0, _size(self.folder) - model - checkpoints),
        )


def _is_open_as(descriptor: int, path: Path) -> bool:
    """Return whether a descriptor is that of the file that lies there."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


def _as_bytes(found: Mapping[str, object]) -> bytes:
    return (json.dumps(dict(found), indent=2) + "\n").encode("utf-8")


def _opened(path: Path) -> BinaryIO:
    """Open a file. Raises OSError, also for a pipe, at which a reader would wait."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return open(descriptor, "rb")
    os.close(descriptor)
    raise OSError(f"{path} is no file")


def _text(path: Path) -> str:
    with contextlib.suppress(OSError), _opened(path) as file:
        return file.read(_LONGEST_FILE).decode("utf-8", "replace")
    return ""


def _object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, an empty one where there is none."""
    with contextlib.suppress(ValueError, RecursionError):
        found = _from_json(_text(path))
        return found if isinstance(found, dict) else {}
    return {}


def _from_json(text: str) -> Any:
    """Return what a JSON text holds, and as a string each number that no reader of ours can hold.

    So what is made of it is JSON to every reader. Raises ValueError and RecursionError.
    """
    return json.loads(
        text,
        parse_constant=str,  # NaN and the infinities, which Python writes and JSON does not know
        parse_float=lambda word: number if math.isfinite(number := float(word)) else word,
        parse_int=lambda word: int(word) if len(word) <= _MOST_DIGITS else word,
    )


def _tail(path: Path, count: int) -> str:
    with contextlib.suppress(OSError), _opened(path) as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - count))
        return file.read(count).decode("utf-8", "replace")
    return ""


def _size(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                status = os.lstat(os.path.join(place, name))
                total += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return total
