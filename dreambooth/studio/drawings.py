"""Draw pictures with `generate` in processes of their own, each with a folder that says it all.

In the folder lie the request, who draws it, its log and the pictures as they come. A drawing goes
on when the page is closed or killed.
"""

from __future__ import annotations

import argparse
import json
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dreambooth.errors import UserError
from dreambooth.process import files
from dreambooth.runs import run_folder
from dreambooth.runs.run_list import RunList
from dreambooth.settings import generate_options
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

_FORM: Final = "form.json"
_REQUEST: Final = "request.json"
_GRID: Final = "grid.png"
_MOST_PICTURES: Final = 64
_RUN: Final = "run "
_BASE: Final = "base "
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

    def pictures(self) -> list[Path]:
        """Return the pictures that are there, in the order of their seeds."""
        return sorted(path for path in self.folder.glob("*.png") if path.name != _GRID)

    @property
    def process(self) -> OwnProcess:
        """Return the process that draws it."""
        return OwnProcess(self.folder)

    @property
    def is_drawing(self) -> bool:
        """Return whether its process runs."""
        return self.process.is_running

    @property
    def sentence(self) -> str:
        """Return in words how far it is, and why it has ended if it is not whole."""
        wanted, there = self.request().get("count") or "1", len(self.pictures())
        if self.is_drawing:
            return f"{there} of {wanted} are drawn. {self.process.last_line()}"
        if self.process.was_stopped:
            return f"It was cancelled; {there} of {wanted} were drawn."
        return self.process.fault() or f"{there} were drawn."

    def cancel(self) -> None:
        """End the process; pictures that are there stay."""
        self.process.stop()

    def delete(self) -> None:
        """Delete the request and its pictures."""
        if self.is_drawing:
            raise UserError("It is still being drawn: cancel it first.")
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
        """Return all of them, the newest first."""
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
        """Start to draw what a form says. Raises HyperparameterError with all faults."""
        chosen = form.get(MODEL, "")
        if chosen not in self.models():
            raise UserError("Choose a model to draw with.")
        if any(drawing.is_drawing for drawing in self.all()):
            raise UserError("Other pictures are being drawn: wait for them, or cancel them.")
        request = {name: form[name].strip() for name in FIELDS if form.get(name, "").strip()}
        request.setdefault("seed", str(secrets.randbelow(2**32)))
        _check(request)
        with files.disk_faults_named("The pictures", self.folder, elsewhere=_ELSEWHERE):
            made = self._make()
            content = json.dumps({**request, MODEL: chosen}, indent=2)
            files.write_whole(made.folder / _REQUEST, content.encode())
            self._start(made, request, chosen)
        return made

    def _make(self) -> Drawing:
        self.folder.mkdir(parents=True, exist_ok=True)
        number = max((int(drawing.name) for drawing in self.all()), default=0) + 1
        folder = self.folder / f"{number:04}"
        folder.mkdir()
        return Drawing(folder)

    def _start(self, drawing: Drawing, request: Mapping[str, str], chosen: str) -> None:
        model = chosen.removeprefix(_BASE)
        if chosen.startswith(_RUN):
            model = str(self.runs.run(chosen.removeprefix(_RUN)).folder / run_folder.MODEL)
        drawing.process.start(
            "generate",
            f"--model={model}",
            f"--out={drawing.folder}",
            "--batch_size=1",  # they come one by one
            *(f"--{name}={value}" for name, value in request.items()),
        )


def _check(request: Mapping[str, str]) -> None:
    """Refuse what `generate` would refuse, before it is started."""
    prompts = [request["prompt"]] if "prompt" in request else None
    words: dict[str, Any] = {**request, MODEL: "checked later", "prompt": prompts}
    settings = generate_options.read(argparse.Namespace(**words))
    if settings.count > _MOST_PICTURES:
        raise UserError(f"At most {_MOST_PICTURES} pictures are drawn at a time.")


def _texts(path: Path) -> dict[str, str]:
    found = object_of(path)
    return {
        name: value
        for name, value in found.items()
        if name in (*FIELDS, MODEL) and isinstance(value, str)
    }
