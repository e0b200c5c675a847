"""Slide over the states of a run, see their pictures and numbers side by side, and keep one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nicegui import ui

from dreambooth.runs.run_folder import Run, RunState
from dreambooth.runs.run_list import RunList
from dreambooth.runs.run_states import StateFiles
from dreambooth.studio import parts
from dreambooth.studio.choices import Choices, reading_at, scoring
from dreambooth.studio.drawings import Drawing, keeping
from dreambooth.studio.routes import drawing_address

_NOT_ENDED: Final = (RunState.RUNNING, RunState.WAITING, RunState.DRAFT)
_READ: Final[Mapping[str, str]] = {
    "loss": "Loss on your pictures, of the base's: lower means more like them",
    "drift_class": "Class moved, of what the subject did: lower means more of it is kept",
    "drift_other_class": "Another class moved, likewise",
    "guidance": "What guidance multiplies, of the base's: pictures may burn well above 1",
}
_SCORED: Final[Mapping[str, str]] = {
    "subject": "The subject is drawn",
    "likeness": "Likeness to your pictures",
    "class_kept": "The class is drawn, and not the subject",
    "other_class_kept": "So is another class",
    "clean": "The pictures are clean",
}
_OF_THE_BASE: Final[Mapping[str, float]] = {
    "loss": 1.0,
    "drift_class": 0.0,
    "drift_other_class": 0.0,
    "guidance": 1.0,
}


def draw(runs: RunList, run: Run) -> Callable[[RunState], Awaitable[None]]:
    """Draw the section, and return the function that brings it up to date."""
    return _Section(Choices(runs, run)).update


class _Section:
    """What is shown of a choice. The place of the slider is the page's own."""

    def __init__(self, choices: Choices) -> None:
        self._choices = choices
        self._states: list[StateFiles] = []
        self._model_step: int | None = None
        self._at: int | None = None  # the step at which the slider stands
        self._drawn: object = None
        with parts.tag("section") as self._section:
            parts.text("h2", "Choose")
            parts.text(
                "p",
                "These are the states that the run has kept. Slide to one, let it draw, compare: "
                "the one that you keep becomes the model, which is then what is drawn with, served "
                "and downloaded. The model that it replaces stays here as a state.",
                classes="note",
            )
            with parts.tag("p", classes="legend"):
                parts.text("label", "State:", **{"for": "choose-state"})
                self._where = parts.text("output", "", **{"for": "choose-state"})
            self._slider = parts.tag(
                "input", classes="slider", id="choose-state", type="range", min=0, step=1
            )
            self._slider.on("input", self._slide, js_handler="(e) => emit(e.target.value)")
            with parts.tag("div", classes="row-of-buttons"):
                self._draw = parts.second_button("Draw this state", self._do_draw)
                self._cancel = parts.second_button("Cancel the drawing", self._do_cancel)
                self._keep = ui.button("Keep this one", on_click=parts.told(self._do_keep))
            self._sentence = parts.text("p", "", role="status")
            self._place = parts.tag("div")
        self._section.set_visibility(False)

    async def _slide(self, event: Any) -> None:
        place = str(event.args)
        if place.isdecimal() and int(place) < len(self._states):
            self._at = self._states[int(place)].step
            await self._show()

    async def _do_draw(self) -> None:
        await asyncio.to_thread(self._choices.draw, self._state)
        await self._show()

    async def _do_cancel(self) -> None:
        await asyncio.to_thread(self._choices.cancel)

    async def _do_keep(self) -> None:
        await asyncio.to_thread(self._choices.keep, self._state)
        await self._show()

    @property
    def _state(self) -> StateFiles:
        return next(state for state in self._states if state.step == self._at)

    async def update(self, run_state: RunState) -> None:
        """Bring the section up to date; it is shown once there is something to choose."""
        self._states = [] if run_state in _NOT_ENDED else self._choices.states()
        self._model_step = self._choices.model_step() if self._states else None
        steps = [state.step for state in self._states]
        is_shown = len(steps) > 1 and self._model_step is not None
        self._section.set_visibility(is_shown)
        if not is_shown:
            return
        if self._at not in steps:
            self._at = self._model_step
        await asyncio.to_thread(self._choices.advance)
        await self._show()

    async def _show(self) -> None:
        """Show the state at which the slider stands, beside the base and the model."""
        self._show_slider()
        columns = await asyncio.to_thread(self._columns)
        self._show_buttons(columns)
        readings = await asyncio.to_thread(self._choices.readings)
        scores = [self._choices.scores(one.drawing) if one.drawing else {} for one in columns]
        found = [(one.title, one.drawing and one.drawing.name, one.pictures) for one in columns]
        content = (found, len(readings), scores)
        if content != self._drawn:
            self._drawn = content
            self._place.clear()
            with self._place:
                _meter(columns, readings)
                _pictures(self._choices.prompts(), columns)
                _scores(columns, scores)

    def _show_slider(self) -> None:
        steps = [state.step for state in self._states]
        where = f"step {self._at} (the model now is that of {self._model_step})"
        if self._at == self._model_step:
            where = f"step {self._at} (the model now)"
        self._where.text = where
        place = steps.index(self._at or 0)
        wanted = {"max": len(steps) - 1, "value": place, "aria-valuetext": where}
        if any(self._slider.props.get(name) != value for name, value in wanted.items()):
            self._slider.props.update(wanted)
            self._slider.update()

    def _show_buttons(self, columns: list[_Column]) -> None:
        """Show what can be done, and how far it is."""
        mine = next(one.drawing for one in columns if one.step == self._at)
        process = keeping(self._choices.run)
        to_come = [one for one in columns if one.drawing and not one.drawing.has_ended]
        is_whole = all(one.drawing is not None and one.drawing.is_whole for one in columns)
        self._keep.set_enabled(self._at != self._model_step and not process.is_running)
        self._draw.set_visibility(not is_whole)
        self._draw.set_enabled(not to_come)
        self._cancel.set_visibility(bool(to_come))
        said = [f"{one.title}: {one.drawing.sentence}" for one in to_come if one.drawing]
        if mine is not None and mine.has_ended:
            scored = scoring(mine)
            said.append(mine.sentence * (not mine.is_whole))
            said.append("The pictures are being scored." * scored.is_running)
            said.append(f"No scores: {scored.fault()}" if scored.fault() else "")
        said.append("The model is being replaced." if process.is_running else process.fault())
        self._sentence.text = " ".join(filter(None, said))

    def _columns(self) -> list[_Column]:
        """Return what stands side by side: the base, the state, and the model if it is another."""
        found = []
        if self._choices.drawings.names_base(self._choices.run):
            found.append(_Column(title="base", step=None, drawing=self._choices.drawn(None)))
        place = len(found)
        for state in self._states:
            is_model = state.step == self._model_step
            if is_model or state.step == self._at:
                column = _Column(
                    title=f"step {state.step}{', the model now' * is_model}",
                    step=state.step,
                    drawing=self._choices.drawn(state),
                )
                found.insert(place if state.step == self._at else len(found), column)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Column:
    """What is compared with others. step: None of the base. drawing: None before there is one."""

    title: str
    step: int | None
    drawing: Drawing | None

    @property
    def pictures(self) -> dict[int, Path]:
        """Return its pictures by the number of their prompts."""
        return self.drawing.by_number() if self.drawing is not None else {}


def _meter(columns: list[_Column], readings: Mapping[int, Mapping[str, float]]) -> None:
    """Draw the meter's figures as far as any of the states has them."""
    heads, rows = ["What the meter read"], [[label] for label in _READ.values()]
    for column in columns:
        at, figures = column.step, _OF_THE_BASE
        if column.step is not None:
            at, figures = reading_at(readings, column.step) or (column.step, {})
        heads.append(column.title + ("" if at == column.step else f" (read at {at})"))
        for row, name in zip(rows, _READ, strict=True):
            row.append(f"{figures[name]:.2f}" if name in figures else "not read")
    at_states = [number for number, one in enumerate(columns, start=1) if one.step is not None]
    rows = [row for row in rows if any(row[number] != "not read" for number in at_states)]
    if rows:
        parts.table("Numbers of the states", heads, rows)


def _scores(columns: list[_Column], scores: list[dict[str, float]]) -> None:
    """Draw the scores of the pictures; the base, with which they are compared, has none."""
    if not any(scores):
        return
    shown = [one for column, one in zip(columns, scores, strict=True) if column.step is not None]
    titles = [column.title for column in columns if column.step is not None]
    rows = [
        [label, *(f"{one[name]:.2f}" if name in one else "not measured" for one in shown)]
        for name, label in _SCORED.items()
    ]
    heads = ["Scores of these pictures", *titles]
    parts.table("From 0 to 1; of so few pictures they are only a hint", heads, rows)


def _pictures(prompts: list[str], columns: list[_Column]) -> None:
    if not any(column.pictures for column in columns):
        return
    for number, prompt in enumerate(prompts):
        with parts.tag("div", role="group", aria_label=prompt):
            parts.text("h3", prompt)
            with parts.tag("div", classes="pictures three"):
                for column in columns:
                    with parts.tag("figure"):
                        if column.drawing is not None and number in column.pictures:
                            picture = column.pictures[number].name
                            address = drawing_address(column.drawing.name, picture)
                            parts.tag("img", src=address, alt=f"{column.title}: {prompt}")
                        parts.text("figcaption", column.title)
