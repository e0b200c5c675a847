"""Slide over the states of a run, see their pictures and numbers side by side, and keep one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final

from nicegui import ui

from dreambooth.runs.run_folder import Run, RunState
from dreambooth.runs.run_list import RunList
from dreambooth.runs.run_states import StateFiles
from dreambooth.studio import parts
from dreambooth.studio.choices import Choices, reading_at
from dreambooth.studio.drawings import Drawing, keeping
from dreambooth.studio.routes import drawing_address

_NOT_ENDED: Final = (RunState.RUNNING, RunState.WAITING, RunState.DRAFT)
_NUMBERS: Final[Mapping[str, str]] = {
    "loss": "Loss on your pictures, of the base's: lower means more like them",
    "drift_class": "Class moved, of what the subject did: lower means more of it is kept",
    "drift_other_class": "Another class moved, likewise",
    "guidance": "What guidance multiplies, of the base's: pictures may burn well above 1",
}
_OF_THE_BASE: Final = {"loss": 1.0, "drift_class": 0.0, "drift_other_class": 0.0, "guidance": 1.0}


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
        self._at = self._states[int(event.args)].step
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
        await self._show()

    async def _show(self) -> None:
        """Show the state at which the slider stands, beside the base and the model."""
        steps, is_model = [state.step for state in self._states], self._at == self._model_step
        place, where = steps.index(self._at or 0), f"step {self._at}"
        where += (
            " (the model now)" if is_model else f" (the model now is that of {self._model_step})"
        )
        self._where.text = where
        wanted = {"max": len(steps) - 1, "value": place, "aria-valuetext": where}
        if any(self._slider.props.get(name) != value for name, value in wanted.items()):
            self._slider.props.update(wanted)
            self._slider.update()
        columns = await asyncio.to_thread(self._columns)
        mine = columns[1][1]
        process = keeping(self._choices.run)
        to_come = [one for _, one in columns if one is not None and not one.has_ended]
        self._keep.set_enabled(not is_model and not process.is_running)
        self._draw.set_visibility(mine is None or len(mine.pictures()) < mine.wanted)
        self._draw.set_enabled(not to_come)
        self._cancel.set_visibility(bool(to_come))
        said = [f"{title}: {one.sentence}" for title, one in columns if one in to_come]
        if process.is_running:
            said.append("The model is being replaced.")
        elif process.was_started and process.fault():
            said.append(process.fault())
        elif mine is not None and mine.has_ended and len(mine.pictures()) < mine.wanted:
            said.append(mine.sentence)
        self._sentence.text = " ".join(said)
        readings = await asyncio.to_thread(self._choices.readings)
        pictures = [(title, one.name if one else "", _by_number(one)) for title, one in columns]
        content = (pictures, self._at, self._model_step, len(readings))
        if content != self._drawn:
            self._drawn = content
            self._place.clear()
            with self._place:
                self._numbers(readings)
                _pictures(self._choices.prompts(), columns)

    def _columns(self) -> list[tuple[str, Drawing | None]]:
        """Return what stands side by side: the base, the state, and the model if it is another."""
        found: list[tuple[str, Drawing | None]] = [("base", self._choices.drawn(None))]
        for state in self._states:
            if state.step == self._at:
                found.insert(1, (f"step {state.step}", self._choices.drawn(state)))
            elif state.step == self._model_step:
                found.append((f"step {state.step}, the model now", self._choices.drawn(state)))
        return found

    def _numbers(self, readings: Mapping[int, Mapping[str, float]]) -> None:
        shown = dict.fromkeys((self._at or 0, self._model_step or 0))
        found = {step: reading_at(readings, step) for step in shown}
        heads, there = ["What the meter read", "base"], set[str]()
        for step, reading in found.items():
            late = f" (read at {reading[0]})" if reading and reading[0] != step else ""
            heads.append(f"step {step}{', the model now' * (step == self._model_step)}{late}")
            there |= set(reading[1]) if reading else set()
        rows = [
            (label, f"{_OF_THE_BASE[name]:.2f}", *(_number(found[step], name) for step in shown))
            for name, label in _NUMBERS.items()
            if name in there
        ]
        if rows:
            parts.table("Numbers of the states", heads, rows)


def _number(reading: tuple[int, Mapping[str, float]] | None, name: str) -> str:
    value = None if reading is None else reading[1].get(name)
    return "not read" if value is None else f"{value:.2f}"


def _pictures(prompts: list[str], columns: list[tuple[str, Drawing | None]]) -> None:
    by_column = [(title, one, _by_number(one)) for title, one in columns if one is not None]
    if not any(found for _, _, found in by_column):
        return
    for number, prompt in enumerate(prompts):
        with parts.tag("div", role="group", aria_label=prompt):
            parts.text("h3", prompt)
            with parts.tag("div", classes="pictures three"):
                for title, drawing, found in by_column:
                    with parts.tag("figure"):
                        if drawing is not None and number in found:
                            address = drawing_address(drawing.name, found[number].name)
                            parts.tag("img", src=address, alt=f"{title}: {prompt}")
                        parts.text("figcaption", title)


def _by_number(drawing: Drawing | None) -> dict[int, Path]:
    return drawing.by_number() if drawing is not None else {}
