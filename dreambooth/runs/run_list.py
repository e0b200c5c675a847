"""Keep a list of runs: folders side by side, of which a runner executes those that wait.

The list is what lies on the disk, in the order of the names. Standard library only.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dreambooth.errors import HyperparameterError, ResourceError, UserError, one_line, quoted
from dreambooth.process import child_process, files
from dreambooth.runs import run_folder
from dreambooth.runs.run_folder import Run, RunState
from dreambooth.runs.run_status import RunStatus
from dreambooth.settings import hyperparameters
from dreambooth.settings.sources import LOG_LEVEL

log = logging.getLogger(__name__)

DEFAULT: Final = Path("out/runs")
OPTIONS: Final = ("train", LOG_LEVEL)
"""The settings of a run that are no hyperparameters."""

RUNNER_LOCK: Final = ".runner.lock"
RUNNER_LOG: Final = "runner.log"

_NAME: Final = "[A-Za-z0-9_][A-Za-z0-9._-]{0,79}"
_DELETED: Final = ".deleted-"
_ELSEWHERE: Final = "give another folder with --dir"
_STARTED_S: Final = 30.0
_POLL_S: Final = 0.02


@dataclass(frozen=True, slots=True)
class RunList:
    """The runs in one folder."""

    folder: Path

    def runs(self) -> list[Run]:
        """Return all runs, sorted by name; numbers in names count as numbers.

        Raises UserError where the folder cannot be read.
        """
        try:
            found = [Run(entry) for entry in self.folder.iterdir() if entry.name[0] != "."]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(
                f"The runs in {one_line(str(self.folder), 300)} cannot be listed "
                f"({error.strerror}): {_ELSEWHERE}."
            ) from error
        return sorted((run for run in found if run.exists), key=lambda run: _order(run.name))

    def statuses(self) -> list[RunStatus]:
        """Return how all runs stand; one that cannot be looked at is named in the log."""
        found = []
        for run in self.runs():
            try:
                found.append(RunStatus.of(run))
            except ResourceError as error:
                log.warning(error)
            except UserError:  # it has just been deleted
                pass
        return found

    def run(self, name: str) -> Run:
        """Return the run of this name; raise UserError if there is none."""
        for run in self.runs():  # so that a name can be no path
            if run.name == name:
                return run
        raise UserError(f"There is no run {quoted(name)} in {one_line(str(self.folder), 300)}.")

    def new(self, settings: Mapping[str, object], *, name: str = "") -> Run:
        """Add a run that waits for the runner. Raises HyperparameterError with all faults."""
        check_settings(settings)
        with self._making(name) as run:
            run.write_settings(settings)
        return run

    def new_draft(self, contents: Mapping[str, object], *, name: str = "") -> Run:
        """Add a run that is only a form yet: its contents may be anything."""
        with self._making(name) as run:
            run.write_draft(contents)
        return run

    def again(self, run: Run, changes: Mapping[str, object], *, name: str = "") -> Run:
        """Add a run with the settings of another one and these changes, which waits.

        Pictures inside the other run are copied; an empty change takes a setting back.
        """
        settings = {**_known(run.settings()), **changes}
        check_settings(settings)
        pictures, train = run.folder / run_folder.PICTURES, settings["train"]
        with self._making(name or re.sub("^[0-9]+-", "", run.name)) as new:
            if isinstance(train, str) and Path(train) == Path(os.path.abspath(pictures)):
                settings["train"] = str(new.folder / run_folder.PICTURES)
                shutil.copytree(pictures, new.folder / run_folder.PICTURES)
            new.write_settings(settings)
        return new

    def delete(self, run: Run) -> int:
        """Delete a run that is not running; return the bytes that this frees.

        Raises UserError where this would free nothing, or take what belongs to others.
        """
        name, freed = one_line(run.name, 100), run.sizes().total
        if run.folder.is_symlink():
            raise UserError(
                f"The run {name} is a link to {one_line(str(run.folder.resolve()), 300)}: delete "
                "that folder, and then the link."
            )
        if mounts := files.mounts_in(run.folder):
            raise UserError(
                f"In the run {name} something else is mounted, which would be deleted too: unmount "
                f"{one_line(str(mounts[0]), 300)} first."
            )
        with run.changing(), files.disk_faults_named("The run", run.folder, elsewhere=_ELSEWHERE):
            # A name that no run has: what an interrupted deletion leaves is deleted later.
            run.folder.rename(run.folder.with_name(f"{_DELETED}{os.getpid()}-{time.time_ns()}"))
        self.sweep()
        return freed

    def sweep(self) -> None:
        """Remove what interrupted deletions have left."""
        for left in self.folder.glob(f"{_DELETED}*"):
            if not files.mounts_in(left):
                shutil.rmtree(left, ignore_errors=True)

    def has_runner(self) -> bool:
        """Return whether a runner executes the waiting runs."""
        with contextlib.suppress(OSError):
            descriptor = os.open(self.folder / RUNNER_LOCK, os.O_RDONLY)
            try:
                return not files.try_lock(descriptor, shared=True)
            finally:
                os.close(descriptor)
        return False

    def start(self) -> None:
        """Start the runner, unless one runs already. It ends when no run waits."""
        with files.disk_faults_named("Its log", self.folder, elsewhere=_ELSEWHERE):
            self.folder.mkdir(parents=True, exist_ok=True)
            log = os.open(self.folder / RUNNER_LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            # A second one ends at once. In a session of its own it outlives a terminal or a page.
            runner = subprocess.Popen(
                [sys.executable, "-P", "-m", "dreambooth.runs.runner", str(self.folder.resolve())],
                env=child_process.environment(os.environ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        finally:
            os.close(log)
        # In a process that lives on it must not stay a zombie.
        threading.Thread(target=runner.wait, name="runner", daemon=True).start()
        deadline = time.monotonic() + _STARTED_S
        while runner.poll() is None and not self.has_runner() and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    @contextlib.contextmanager
    def _making(self, name: str) -> Iterator[Run]:
        """Yield a new run to be filled in; nothing is left of it if that fails."""
        run = self._make(name)
        try:
            with files.disk_faults_named("The run", run.folder, elsewhere=_ELSEWHERE):
                yield run
        except BaseException:
            shutil.rmtree(run.folder, ignore_errors=True)
            raise

    def _make(self, name: str) -> Run:
        """Make the folder of a new run: the next number, and a name if one is given."""
        if name and not re.fullmatch(_NAME, name):
            raise UserError(
                f"A run cannot be named {quoted(name)}: take up to 80 letters, digits and the "
                "marks . _ - (no mark but _ at the beginning)."
            )
        with files.disk_faults_named("The run", self.folder, elsewhere=_ELSEWHERE):
            self.folder.mkdir(parents=True, exist_ok=True)
            numbers = [
                int(found[0])
                for entry in self.folder.iterdir()
                if (found := re.match("[0-9]{1,9}", entry.name))
            ]
            number = max(numbers, default=0) + 1
            while True:
                folder = self.folder / "-".join(filter(None, [f"{number:04}", name]))
                try:
                    folder.mkdir()
                except FileExistsError:  # somebody else adds a run at the same time
                    number += 1
                else:
                    return Run(folder)


def submit(run: Run, settings: Mapping[str, object]) -> None:
    """Let a draft wait for the runner. Raises HyperparameterError with all faults."""
    check_settings(settings)
    with run.changing() as state:
        if state != RunState.DRAFT:
            raise UserError(f"The run {run.name} is {state}, and no draft any more.")
        with files.disk_faults_named("The run", run.folder, elsewhere=_ELSEWHERE):
            run.write_settings(settings)


def go_on(run: Run, changes: Mapping[str, object]) -> None:
    """Let a run that has ended wait for the runner, to go on from its checkpoint.

    Without one it begins anew. A run that is done goes on if it is asked for more steps.
    """
    settings = {**_known(run.settings()), **changes}
    if settings.get("resume") == "fresh" and "resume" not in changes:
        del settings["resume"]  # it was meant for the first start
    check_settings(settings)
    with run.changing() as state:
        if state in (RunState.WAITING, RunState.DRAFT):
            raise UserError(f"The run {run.name} has not begun: it is {state}.")
        if state == RunState.DONE and not changes:
            raise UserError(
                f"The run {run.name} is done: to train it further, give it more steps (--max_steps "
                "or --epochs)."
            )
        with files.disk_faults_named("The run", run.folder, elsewhere=_ELSEWHERE):
            run.write_settings(settings)
            # In this order it passes for nothing that it is not, whenever this process is killed.
            for name in (run_folder.PROCESS, run_folder.EXIT_CODE, run_folder.FAILURE):
                (run.folder / name).unlink(missing_ok=True)


def check_settings(settings: Mapping[str, object]) -> None:
    """Refuse settings with which no job would begin; raise HyperparameterError with all faults."""
    faults: list[str] = []
    train = settings.get("train")
    if not isinstance(train, str) or not train:
        faults.append("--train is missing: the folder with the instance images.")
    known = _known(settings)
    faults += [f"A run has no setting {quoted(name)}." for name in settings if name not in known]
    try:
        hyperparameters.parse({name: known[name] for name in known if name not in OPTIONS})
    except HyperparameterError as error:
        faults += error.faults
    if faults:
        raise HyperparameterError(faults)


def _known(settings: Mapping[str, object]) -> dict[str, object]:
    """Return the settings without names that the job would ignore, with a warning."""
    names = {knob.name for knob in hyperparameters.KNOBS} | {*OPTIONS}
    return {name: value for name, value in settings.items() if name in names}


def _order(name: str) -> list[tuple[int, str]]:
    parts = re.split("([0-9]{1,18})", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
