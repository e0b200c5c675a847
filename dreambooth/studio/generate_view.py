"""Draw pictures with a base model or a run's, and show them, with their settings, as they come."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from nicegui import ui

from dreambooth.errors import DreamBoothError
from dreambooth.limits import LIMITS
from dreambooth.settings.generate_options import KNOBS
from dreambooth.settings.knob import Knob
from dreambooth.studio import drawings, parts
from dreambooth.studio.drawings import Drawing, Drawings
from dreambooth.studio.routes import drawing_address

_KNOBS = {knob.name: knob for knob in KNOBS}
_SHOWN = 30  # of all drawings, the newest ones


def draw(found: Drawings) -> Callable[[], Awaitable[None]]:
    """Draw the form and the gallery, and return the function that brings them up to date."""
    parts.text("h1", "Generate")
    fields = _fields(found)

    async def start() -> None:
        await asyncio.to_thread(found.draw, found.form())

    ui.button("Generate", on_click=parts.told(start))
    gallery = parts.tag("div")
    cards: dict[str, Callable[[], None]] = {}

    async def update() -> None:
        models, form = await asyncio.to_thread(lambda: (found.models(), found.form()))
        if fields[drawings.MODEL].options != models:
            fields[drawings.MODEL].set_options(models)
        for name, field in fields.items():
            value = form.get(name, "")
            if name == drawings.MODEL:
                value = value if value in models else next(iter(models))
            if (field.value or "") != value:
                field.set_value(value)
        await asyncio.to_thread(found.advance)
        shown = [one for one in found.all() if not one.is_of_a_run][:_SHOWN]
        if [drawing.name for drawing in shown] != [*cards]:
            cards.clear()
            gallery.clear()
            with gallery:
                cards.update({drawing.name: _card(found, drawing) for drawing in shown})
        for bring_up_to_date in cards.values():
            bring_up_to_date()

    return update


def _fields(found: Drawings) -> dict[str, Any]:
    """Draw the fields of the form, which is stored at each change."""

    def stored(name: str) -> Callable[[Any], None]:
        def store(event: Any) -> None:
            form, typed = found.form(), str(event.value or "")
            if form.get(name, "") != typed:
                try:
                    found.save_form({**form, name: typed})
                except DreamBoothError as error:
                    ui.notify(str(error), type="negative")

        return store

    # The model that is chosen first is stored too: a form says what is drawn.
    models = found.models()
    fields: dict[str, Any] = {
        drawings.MODEL: ui.select(models, label="Model", on_change=stored(drawings.MODEL))
        .props("outlined dense stack-label")
        .classes("wide")
    }
    with parts.tag("div"):
        for name in ("prompt", "negative_prompt"):
            fields[name] = _field(name, stored(name)).classes("wide")
    with parts.tag("div", classes="row-of-buttons"):
        for name in drawings.FIELDS:
            if name not in fields:
                fields[name] = _field(name, stored(name)).classes("short")
    return fields


def _field(name: str, store: Callable[[Any], None]) -> Any:
    knob: Knob = _KNOBS[name]
    hint = "" if knob.default in (None, "") or knob.kind == "str" else f"{knob.default}"
    hint = {"seed": "random", "width": "the model's", "height": "the model's"}.get(name, hint)
    field = ui.input(drawings.FIELDS[name], placeholder=hint, on_change=store)
    most = LIMITS.max_prompt_characters if knob.kind == "str" else 24
    return field.props(f"outlined dense stack-label debounce=300 maxlength={most}")


def _card(found: Drawings, drawing: Drawing) -> Callable[[], None]:
    """Draw one request with its pictures; return the function that brings it up to date."""
    request = drawing.request()

    async def use_again() -> None:
        await asyncio.to_thread(found.save_form, request)

    async def cancel() -> None:
        await asyncio.to_thread(drawing.cancel)

    async def delete() -> None:
        await asyncio.to_thread(drawing.delete)

    with parts.tag("section"):
        parts.text("h2", request.get("prompt", ""))
        settings = {
            found.models().get(value, value) if name == drawings.MODEL else _said(name, value)
            for name, value in request.items()
            if name != "prompt"
        }
        parts.text("p", ", ".join(sorted(settings)), classes="note")
        sentence = parts.text("p", "", role="status")
        place = parts.tag("div", classes="pictures large")
        with parts.tag("div", classes="row-of-buttons"):
            parts.second_button("Use these again", use_again)
            cancel_button = parts.second_button("Cancel", cancel)
            delete_button = parts.second_button("Delete", delete)
    drawn: object = None

    def update() -> None:
        nonlocal drawn
        is_to_come = drawing.is_drawing or drawing.is_waiting
        sentence.text = drawing.sentence
        cancel_button.set_visibility(is_to_come)
        delete_button.set_visibility(not is_to_come)
        pictures = [(path.name, path.stat().st_mtime_ns) for path in drawing.pictures()]
        if pictures != drawn:
            drawn = pictures
            place.clear()
            with place:
                for number, (name, changed) in enumerate(pictures):
                    address = f"{drawing_address(drawing.name, name)}?{changed}"
                    _picture(address, name, number, request)

    return update


def _picture(address: str, name: str, number: int, request: dict[str, str]) -> None:
    seed = request.get("seed", "")
    seed = str(int(seed) + number) if seed.isascii() and seed.isdecimal() else seed
    with parts.tag("figure"):
        parts.tag("img", src=address, alt=f"{request.get('prompt', '')}, seed {seed}")
        with parts.tag("figcaption"):
            link = parts.text("a", f"seed {seed}, download", href=address, download=name)
            link.props["aria-label"] = f"Download the picture of seed {seed}"


def _said(name: str, value: str) -> str:
    return f"{drawings.FIELDS[name].lower()} {value}"
