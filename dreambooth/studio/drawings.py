"""Draw pictures with `generate` in processes of their own, each with a folder that says it all.

In the folder lie the request, who draws it, its log and the pictures as they come. A drawing goes
on when the page is closed or killed. One is drawn at a time; the next one that waits is started by
whichever page looks first.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dreambooth.errors import UserError
from dreambooth.process import files
from dreambooth.runs import run_folder, run_states
from dreambooth.runs.run_folder import Run
from dreambooth.runs.run_list import RunList
from dreambooth.settings import generate_options
from dreambooth.settings.knob import is_unset, unwrapped
from dreambooth.studio.own_process import OwnProcess, object_of

FOLDER: Final = ".drawings"  # no run has such a name
MODEL: Final = "model"
FIELDS: Final[Mapping[str, str]] = {
    "prompt": "Prompt",
    "negative_prompt": "Negative prompt",
    "width": "Width",
    "height": "Height",
    "num_inference_steps": "Steps",
    "guidance_scale": "Guidance",
    "seed": "Seed",
    "count": "Pictures",
}
"""The options of `generate` that the page has fields for, each with its label."""

COMPARED: Final = "compared"
"""In a request, the run whose model and whose base draw the same."""
CHOICE: Final = "choice"
"""In a request, the run of whose states one is to be chosen."""
STAMP: Final = "stamp"
"""In a request, a text that changes with the weights that draw."""

_PRETRAINED: Final = "pretrained_model"
_PROMPTS: Final = "prompts"
_FORM: Final = "form.json"
_REQUEST: Final = "request.json"
_GRID: Final = "grid.png"
_MOST_PICTURES: Final = 64
_MOST_WAITING: Final = 20
_RUN: Final = "run "
_BASE: Final = "base "
_BASE_OF: Final = "base of run "
_STATE: Final = re.compile("state ([0-9]{1,12}) of run (.+)", re.DOTALL)
_KEEPING: Final = ".choice"  # in the folder of a run
_ELSEWHERE: Final = "start the page with another --dir"


@dataclass(frozen=True, slots=True)
class Drawing:
    """One request for pictures and what has come of it."""

    folder: Path

    @property
    def name(self) -> str:
        """Return the name of the folder, a number."""
        return self.folder.name

    def request(self) -> dict[str, str]:
        """Return what was asked for, as texts; the seed is always there."""
        return _texts(self.folder / _REQUEST)

    def prompts(self) -> list[str]:
        """Return what is drawn; all prompts but those of a comparison are one."""
        found = object_of(self.folder / _REQUEST).get(_PROMPTS)
        several = [prompt for prompt in found if isinstance(prompt, str)] if found else []
        return several or [self.request().get("prompt", "")]

    def pictures(self) -> list[Path]:
        """Return the pictures that are there, in the order of their seeds."""
        return sorted(path for path in self.folder.glob("*.png") if path.name != _GRID)

    def by_number(self) -> dict[int, Path]:
        """Return the pictures that are there by the number at the beginning of their names."""
        numbered = ((path.name.partition("_")[0], path) for path in self.pictures())
        return {int(number): path for number, path in numbered if number.isdecimal()}

    @property
    def process(self) -> OwnProcess:
        """Return the process that draws it."""
        return OwnProcess(self.folder)

    @property
    def is_drawing(self) -> bool:
        """Return whether its process runs."""
        return self.process.is_running

    @property
    def is_waiting(self) -> bool:
        """Return whether it is still to be drawn."""
        process = self.process
        return (
            not process.was_started
            and not process.was_stopped
            and (self.folder / _REQUEST).is_file()
        )

    @property
    def is_of_a_run(self) -> bool:
        """Return whether it is shown on the page of a run, and not in the gallery."""
        return bool({COMPARED, CHOICE} & self.request().keys())

    @property
    def has_ended(self) -> bool:
        """Return whether no more pictures come."""
        return not (self.is_drawing or self.is_waiting)

    @property
    def wanted(self) -> int:
        """Return how many pictures were asked for."""
        return len(self.prompts()) * int(self.request().get("count") or "1")

    @property
    def is_whole(self) -> bool:
        """Return whether all pictures are there, and the process has ended."""
        return self.has_ended and len(self.pictures()) == self.wanted

    @property
    def sentence(self) -> str:
        """Return in words how far it is, and why it has ended if it is not whole."""
        wanted, there = self.wanted, len(self.pictures())
        if self.is_waiting:
            return "It waits for the others."
        if self.is_drawing:
            return f"{there} of {wanted} are drawn. {self.process.last_line()}"
        if self.process.was_stopped:
            return f"It was cancelled; {there} of {wanted} were drawn."
        return self.process.fault() or f"{there} were drawn."

    def cancel(self) -> None:
        """End the process, or let it never begin; pictures that are there stay."""
        self.process.stop()

    def delete(self) -> None:
        """Delete the request and its pictures."""
        if not self.has_ended:
            raise UserError("It is still to be drawn: cancel it first.")
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Drawings:
    """All requests, in a folder beside the runs. base: the model that the page was started with."""

    runs: RunList
    base: str | None

    @property
    def folder(self) -> Path:
        """Return where they lie."""
        return self.runs.folder / FOLDER

    def all(self) -> list[Drawing]:
        """Return all of them, those of comparisons too, the newest first."""
        found = [Drawing(path) for path in self.folder.glob("[0-9]*") if path.name.isdecimal()]
        return sorted(found, key=lambda drawing: int(drawing.name), reverse=True)

    def drawing(self, name: str) -> Drawing:
        """Return the one of this name; raise UserError if there is none."""
        for drawing in self.all():  # so that a name can be no path
            if drawing.name == name:
                return drawing
        raise UserError("There are no such pictures.")

    def models(self) -> dict[str, str]:
        """Return what pictures can be drawn with, and what a reader calls each."""
        bases = [base for base in (self.base, "tiny") if base]
        names = {f"{_BASE}{base}": base if base != "tiny" else "embedded model" for base in bases}
        runs = [run.name for run in self.runs.runs() if run.has_model()]
        return {**{f"{_RUN}{name}": f"run {name}" for name in runs}, **names}

    def form(self) -> dict[str, str]:
        """Return the contents of the form."""
        return _texts(self.folder / _FORM)

    def save_form(self, contents: Mapping[str, str]) -> None:
        """Store the contents of the form. Raises ResourceError."""
        with files.disk_faults_named("The form", self.folder, elsewhere=_ELSEWHERE):
            self.folder.mkdir(parents=True, exist_ok=True)
            files.write_whole(self.folder / _FORM, json.dumps(dict(contents)).encode())

    def draw(self, form: Mapping[str, str]) -> Drawing:
        """Draw what a form says, once no other is drawn. Raises HyperparameterError, all faults."""
        chosen = form.get(MODEL, "")
        if chosen not in self.models():
            raise UserError("Choose a model to draw with.")
        request = {name: form[name].strip() for name in FIELDS if form.get(name, "").strip()}
        request.setdefault("seed", str(secrets.randbelow(2**32)))
        _check(request, [request["prompt"]] if "prompt" in request else [])
        made = self._make({**request, MODEL: chosen})
        self.advance()
        return made

    def compare(self, run: Run, prompts: Sequence[str], settings: Mapping[str, str]) -> None:
        """Draw each prompt with a run's model and with its base, from the same seed.

        What was compared before is deleted. settings: those of `FIELDS` that differ from the
        defaults. Raises HyperparameterError with all faults.
        """
        if not self.names_base(run):
            raise UserError(
                f"The run {run.name} does not name the base model that it started from."
            )
        request = {name: value.strip() for name, value in settings.items() if value.strip()}
        request.setdefault("seed", str(secrets.randbelow(2**32)))
        before = [one for one in self.all() if one.request().get(COMPARED) == run.name]
        if not all(old.has_ended for old in before):
            raise UserError("The last comparison is still to be drawn: cancel it first.")
        _check(request, prompts)
        for old in before:
            old.delete()
        request |= {COMPARED: run.name, STAMP: _stamp_of_model(run)}
        for model in (self.base_of(run), f"{_RUN}{run.name}"):
            self.add({**request, MODEL: model}, prompts)
        self.advance()

    def add(self, request: Mapping[str, str], prompts: Sequence[str]) -> None:
        """Let a request wait that is none of the gallery, to be drawn with `advance`.

        What was drawn for a run that is gone is deleted. Raises HyperparameterError with all
        faults.
        """
        _check(request, prompts)
        names = {run.name for run in self.runs.runs()}
        for old in self.all():
            asked = old.request()
            whose = asked.get(COMPARED) or asked.get(CHOICE)
            if whose is not None and whose not in names and old.has_ended:
                old.delete()
        self._make({**request, _PROMPTS: [*prompts]})

    def names_base(self, run: Run) -> bool:
        """Return whether a run names the base model that it started from."""
        return not is_unset(run.settings().get(_PRETRAINED))

    def base_of(self, run: Run) -> str:
        """Return what a request says for the base of a run."""
        return f"{_BASE_OF}{run.name}"

    def state_of(self, run: Run, step: int) -> str:
        """Return what a request says for the state of a run after a step."""
        return f"state {step} of run {run.name}"

    def draws_with(self, run: Run) -> bool:
        """Return whether pictures are drawn with a run's model or one of its states."""
        return any(
            drawing.is_drawing and _run_of(drawing.request().get(MODEL, "")) == run.name
            for drawing in self.all()
        )

    def comparison(self, run: Run) -> list[Drawing]:
        """Return what the base and the run's model draw, in this order; nothing before that.

        What an earlier model of the run has drawn does not count.
        """
        mine = (run.name, _stamp_of_model(run))
        asked = [(found, found.request()) for found in self.all()[::-1]]
        return [found for found, one in asked if (one.get(COMPARED), one.get(STAMP)) == mine]

    def advance(self) -> None:
        """Start the oldest request that waits, unless another one is drawn.

        Raises ResourceError.
        """
        if not any(drawing.is_waiting for drawing in self.all()):
            return
        with files.disk_faults_named("The pictures", self.folder, elsewhere=_ELSEWHERE):
            lock = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                if not files.try_lock(lock):  # another page does it
                    return
                found = self.all()
                if not any(drawing.is_drawing for drawing in found):
                    self._start(next(filter(self._may_begin, reversed(found))))
            except StopIteration:  # another page has done it
                pass
            finally:
                os.close(lock)

    def _may_begin(self, drawing: Drawing) -> bool:
        """Return whether a request waits for nothing, not even for a model that is replaced."""
        name = _run_of(drawing.request().get(MODEL, ""))
        is_replaced = name != "" and keeping(Run(self.runs.folder / name)).is_running
        return drawing.is_waiting and not is_replaced

    def _make(self, request: Mapping[str, object]) -> Drawing:
        """Make the folder of a request that waits, whole before any other page sees it."""
        if sum(drawing.is_waiting for drawing in self.all()) >= _MOST_WAITING:
            raise UserError(f"{_MOST_WAITING} requests wait already: let some be drawn first.")
        with files.disk_faults_named("The pictures", self.folder, elsewhere=_ELSEWHERE):
            self.folder.mkdir(parents=True, exist_ok=True)
            number = max((int(drawing.name) for drawing in self.all()), default=0) + 1
            folder = self.folder / f"{number:04}"
            folder.mkdir()
            files.write_whole(folder / _REQUEST, json.dumps(dict(request), indent=2).encode())
        return Drawing(folder)

    def _start(self, drawing: Drawing) -> None:
        request = drawing.request()
        drawing.process.start(
            "generate",
            *(f"--{name}={value}" for name, value in self.options_of(request[MODEL]).items()),
            f"--out={drawing.folder}",
            "--batch_size=1",  # they come one by one
            *(f"--prompt={prompt}" for prompt in drawing.prompts()),
            *(
                f"--{name}={request[name]}"
                for name in FIELDS
                if name in request and name != "prompt"
            ),
            then=self.advance,
        )

    def options_of(self, chosen: str) -> dict[str, str]:
        """Return the options of `generate` that name a model."""
        if name := _run_of(chosen):
            model = {MODEL: str(self.runs.folder / name / run_folder.MODEL)}
            state = _STATE.fullmatch(chosen)
            return model | ({"state": state[1]} if state else {})
        if not chosen.startswith(_BASE_OF):
            return {MODEL: chosen.removeprefix(_BASE)}
        settings = Run(self.runs.folder / chosen.removeprefix(_BASE_OF)).settings()
        options = {MODEL: settings.get(_PRETRAINED)}
        options |= {name: settings.get(name) for name in ("base", "prediction_type")}
        return {
            name: unwrapped(value) or "" for name, value in options.items() if not is_unset(value)
        }


def keeping(run: Run) -> OwnProcess:
    """Return the process that makes a state of a run its model."""
    return OwnProcess(run.folder / _KEEPING)


def _stamp_of_model(run: Run) -> str:
    model = run_states.model_state(run)
    return model.stamp if model is not None else ""


def _run_of(model: str) -> str:
    """Return the run whose model or state draws, "" where it is none."""
    state = _STATE.fullmatch(model)
    return state[2] if state else model.removeprefix(_RUN) if model.startswith(_RUN) else ""


def _check(request: Mapping[str, str], prompts: Sequence[str]) -> None:
    """Refuse what `generate` would refuse, before it is started."""
    words: dict[str, Any] = {**request, MODEL: "checked later", "prompt": [*prompts] or None}
    settings = generate_options.read(argparse.Namespace(**words))
    if settings.count > _MOST_PICTURES:
        raise UserError(f"At most {_MOST_PICTURES} pictures are drawn at a time.")


def _texts(path: Path) -> dict[str, str]:
    found = object_of(path)
    return {
        name: value
        for name, value in found.items()
        if name in (*FIELDS, MODEL, COMPARED, CHOICE, STAMP) and isinstance(value, str)
    }
