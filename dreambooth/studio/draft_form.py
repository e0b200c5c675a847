"""The form of a draft: pictures, prompts, settings, the plan and the start.

Whatever is typed is stored in the draft's folder at once, and shown from there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

from nicegui import ui

from dreambooth.errors import UserError
from dreambooth.limits import LIMITS
from dreambooth.runs import run_list
from dreambooth.runs.run_folder import Run
from dreambooth.runs.run_list import RunList
from dreambooth.settings.hyperparameters import KNOBS
from dreambooth.settings.knob import Knob
from dreambooth.studio import drafts, durations, parts, uploads
from dreambooth.studio.drafts import DraftPlan
from dreambooth.studio.durations import StepTime
from dreambooth.studio.routes import run_address

_TYPED: Final = "outlined dense stack-label debounce=300"
_HINT: Final = (
    "The instance prompt names the subject with a rare word before its class: in “a photo of a "
    "riobugger cat”, riobugger is a name that the model knows nothing about yet. The class prompt "
    "says the same without the name; prior preservation needs it."
)


def draw(runs: RunList, run: Run) -> Callable[[], Awaitable[None]]:
    """Draw the form, and return the function that brings it up to date."""
    parts.text("h1", f"New run {run.name}")
    form = _Form(run)
    show_pictures = _pictures(run)
    with parts.tag("section"):
        parts.text("h2", "Preset")
        with parts.tag("div", classes="row-of-buttons"):
            presets = [(name, _preset_button(form, name)) for name in drafts.PRESETS]
        preset_sentence = parts.text("p", "", classes="note")
    with parts.tag("section"):
        parts.text("h2", "Prompts")
        parts.text("p", _HINT, classes="note")
        form.add_text(drafts.INSTANCE_PROMPT, "Instance prompt")
        form.add_text(drafts.CLASS_PROMPT, "Class prompt")
        hint = parts.text("p", "", role="status")
    with parts.tag("section"):
        parts.text("h2", "Settings")
        _settings(form)
    _plan_and_start(runs, run)
    with parts.tag("section"):
        parts.delete_button(runs, run)

    async def update() -> None:
        contents = run.draft()
        form.show(contents)
        show_pictures(contents)
        hint.text = drafts.prompt_hint(contents)
        chosen = drafts.text(contents, drafts.PRESET)
        for name, button in presets:
            button.props["aria-pressed"] = "true" if name == chosen else "false"
            button.classes(
                add="chosen" if name == chosen else None,
                remove=None if name == chosen else "chosen",
            )
        if chosen in drafts.PRESETS:
            preset_sentence.text = drafts.PRESETS[chosen].sentence

    return update


class _Form:
    """The fields, each of which shows one text of the draft and stores it when it is changed."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._texts: dict[str, Any] = {}
        self._settings: dict[str, Any] = {}

    def add_text(self, key: str, label: str) -> None:
        """Draw the field of a prompt."""
        most = LIMITS.max_prompt_characters
        field = ui.input(label, on_change=lambda event: self._store(key, event.value))
        self._texts[key] = field.props(f"{_TYPED} maxlength={most}").classes("wide")

    def add_setting(self, knob: Knob, label: str) -> Any:
        """Draw the field of a hyperparameter; an empty one means the default."""

        def store(event: Any) -> None:
            self._store_setting(knob.name, event.value)

        choices = knob.choices or (("True", "False") if knob.kind == "bool" else ())
        if choices:
            options = {"": f"default ({knob.default})", **{value: value for value in choices}}
            field = ui.select(options, label=label, value="", on_change=store)
            field.props("outlined dense stack-label")
        else:
            field = ui.input(label, placeholder=f"default: {knob.default}", on_change=store)
            field.props(f"{_TYPED} maxlength={LIMITS.max_hyperparameter_characters}")
        self._settings[knob.name] = field.classes("wide")
        return field

    def show(self, contents: dict[str, Any]) -> None:
        """Show the contents of the draft, which somebody else may have changed."""
        for key, field in self._texts.items():
            self._set(field, drafts.text(contents, key))
        settings = drafts.text_settings(contents)
        for name, field in self._settings.items():
            value = settings.get(name, "")
            is_choice = not isinstance(field, ui.select) or value in field.options
            self._set(field, value if is_choice else "")

    @staticmethod
    def _set(field: Any, value: str) -> None:
        if (field.value or "") != value:
            field.set_value(value)

    def store_all(self, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Store a change of the whole form, if it is one."""
        contents = self._run.draft()
        changed = change(contents)
        if changed != contents:
            try:
                self._run.save_draft(changed)
            except (OSError, UserError) as error:
                ui.notify(f"The form was not saved: {error}", type="negative")

    def _store(self, key: str, value: object) -> None:
        typed = str(value or "")
        self.store_all(
            lambda contents: (
                contents if drafts.text(contents, key) == typed else {**contents, key: typed}
            )
        )

    def _store_setting(self, name: str, value: object) -> None:
        def change(contents: dict[str, Any]) -> dict[str, Any]:
            settings = drafts.text_settings(contents)
            if (value or "") == settings.get(name, ""):
                return contents
            settings.pop(name, None)
            return {
                **contents,
                drafts.SETTINGS: {**settings, **({name: str(value)} if value else {})},
            }

        self.store_all(change)


def _preset_button(form: _Form, name: str) -> Any:
    async def choose() -> None:
        form.store_all(lambda contents: drafts.with_preset(contents, name))

    return parts.second_button(drafts.PRESETS[name].title, choose)


def _pictures(run: Run) -> Callable[[dict[str, Any]], None]:
    """Draw where pictures are dropped, and return the function that shows those that are there."""
    with parts.tag("section"):
        parts.text("h2", "Pictures")
        address = run_address(run.name, "pictures")
        with parts.tag("div", classes="drop", data_upload=address):
            label = parts.text("label", "Drop 4 to 20 pictures of one subject here")
            chooser = parts.tag("input", type="file", multiple=True, accept="image/*")
            label.props["for"] = chooser.html_id
        parts.tag("div", data_upload_status=True, role="alert", classes="faults")
        count = parts.text("p", "", role="status", classes="note")
        grid = parts.tag("div", classes="pictures")
    drawn: object = None

    def show(contents: dict[str, Any]) -> None:
        nonlocal drawn
        side = drafts.side_of(contents)
        names = [path.name for path in uploads.pictures(run)]
        if (names, side) == drawn:
            return
        drawn = (names, side)
        count.text = (
            f"{len(names)} pictures, shown as training sees them: {side} x {side} pixels, here the "
            "middle of each."
            if names
            else "There is no picture yet."
        )
        grid.clear()
        with grid:
            for name in names:
                _picture(run, name, side)

    return show


def _picture(run: Run, name: str, side: int) -> None:
    async def remove() -> None:
        await asyncio.to_thread(uploads.remove, run, name)

    with parts.tag("figure"):
        address = f"{run_address(run.name, 'pictures', name)}?side={side}"
        parts.tag("img", src=address, alt=name, loading="lazy")
        with parts.tag("figcaption"):
            button = parts.second_button("Remove", remove).props("dense")
            button.props["aria-label"] = f"Remove {name}"


def _settings(form: _Form) -> None:
    """Draw every hyperparameter of the table, in a fold with a search."""
    by_name = {knob.name: knob for knob in KNOBS}
    form.add_setting(by_name["pretrained_model"], "Base model (folder, file, hub id, or tiny)")
    form.add_setting(by_name["max_steps"], "Steps")
    rows: list[tuple[str, Any]] = []

    def search(event: Any) -> None:
        words = str(event.value or "").lower().split()
        for found, row in rows:
            row.set_visibility(all(word in found for word in words))

    with ui.expansion("All settings").classes("wide"):
        ui.input("Search the settings", on_change=search).props("outlined dense").classes("wide")
        for knob in KNOBS:
            if knob.name in ("pretrained_model", "max_steps"):
                continue
            with parts.tag("div", classes="setting") as row:
                form.add_setting(knob, knob.name)
                parts.text("p", f"{knob.sentence} ({knob.values})", classes="note")
            rows.append((f"{knob.name} {knob.sentence}".lower(), row))


def _plan_and_start(runs: RunList, run: Run) -> None:
    async def plan() -> DraftPlan:
        place.clear()
        with place:
            parts.text("p", "A dry run checks the pictures and the settings ...", role="status")
        found = await drafts.plan(run)
        settings = {} if found.fault else await asyncio.to_thread(drafts.prepare, run)
        step_time = await asyncio.to_thread(durations.known, runs, settings)
        place.clear()
        with place:
            _show_plan(found, step_time)
        return found

    async def only_plan() -> None:
        await plan()

    async def measure() -> None:
        settings = await asyncio.to_thread(drafts.prepare, run)
        place.clear()
        with place:
            parts.text("p", "A few steps of this job are taken ...", role="status")
        try:
            await durations.measure(runs, run, settings)
        finally:
            place.clear()
        await plan()

    async def start() -> None:
        if not (await plan()).fault:
            settings = await asyncio.to_thread(drafts.prepare, run)
            await asyncio.to_thread(run_list.submit, run, settings)
            await asyncio.to_thread(runs.start)

    with parts.tag("section"):
        parts.text("h2", "Plan and start")
        with parts.tag("div", classes="row-of-buttons"):
            parts.second_button("Show the plan", only_plan)
            parts.second_button("Measure the time", measure)
            ui.button("Start", on_click=parts.told(start))
        place = parts.tag("div")


def _show_plan(found: DraftPlan, step_time: StepTime | None) -> None:
    if found.fault:
        parts.text("p", found.fault, role="alert", classes="faults")
    if found.warnings:
        with parts.tag("ul", classes="warnings"):
            for warning in found.warnings:
                parts.text("li", warning)
    if found.rows:
        time = (
            "not known for such a job on this machine; “Measure the time” takes a few steps of it"
        )
        if step_time is not None and found.steps is not None:
            time = step_time.sentence(found.steps)
        parts.table("What the job will do", (), [("time", time), *found.rows])
