"""Small parts of the page. Texts are given as texts: none of them is read as HTML or Markdown."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from nicegui import ui
from nicegui.elements.mixins.text_element import TextElement

from dreambooth.errors import DreamBoothError, UserError
from dreambooth.limits import size_in_words
from dreambooth.runs.run_folder import Run
from dreambooth.runs.run_list import RunList
from dreambooth.studio.model_server import ModelServer


def tag(name: str, *, classes: str = "", **attributes: object) -> ui.element:
    """Return an HTML element. Values never go through `props(...)`, which would parse them."""
    return _dressed(ui.element(name), classes, attributes)


def text(name: str, content: str, *, classes: str = "", **attributes: object) -> Any:
    """Return an HTML element with a text inside, which its `text` changes."""
    return _dressed(TextElement(tag=name, text=content), classes, attributes)


def _dressed(element: Any, classes: str, attributes: dict[str, object]) -> Any:
    for name, value in attributes.items():
        element.props[name.replace("_", "-")] = value
    return element.classes(classes)


def told(action: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
    """Return a handler that shows what a user can do about an error of the action."""
    client = ui.context.client  # the button may be gone by then

    async def handler() -> None:
        try:
            await action()
        except DreamBoothError as error:
            with client:
                ui.notify(
                    str(error), type="negative", multi_line=True, timeout=0, close_button="Close"
                )

    return handler


def second_button(label: str, action: Callable[[], Awaitable[None]]) -> Any:
    """Return a button that is not the page's first choice; its text has the colour of all texts."""
    return ui.button(label, on_click=told(action), color=None).props("outline")


def scrolled(label: str) -> ui.element:
    """Return the place of a table that may be too wide; arrow keys scroll it."""
    return tag("div", classes="scrolled", tabindex="0", role="region", aria_label=label)


def fold(title: str) -> ui.element:
    """Return the place of what is shown once its title is opened, with the keyboard too."""
    with tag("details") as details:
        text("summary", title)
    return details


def table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Draw a table of texts."""
    with scrolled(caption), tag("table"):
        text("caption", caption)
        if heads:
            with tag("thead"), tag("tr"):
                for head in heads:
                    text("th", head, scope="col")
        with tag("tbody"):
            for row in rows:
                with tag("tr"):
                    for number, cell in enumerate(row):
                        text("td" if number or heads else "th", cell)


def copied(label: str, content: str) -> Any:
    """Draw a text to be copied, with a button that does it; the text is `.text` of the result."""
    with tag("div", classes="copied"):
        shown = text("pre", content, tabindex="0", aria_label=label)
        button = ui.button("Copy", on_click=lambda: ui.clipboard.write(shown.text), color=None)
        button.props("outline dense").props["aria-label"] = f"Copy: {label}"
    return shown


def delete_button(runs: RunList, run: Run) -> None:
    """Draw a button that deletes a run, once the user has read what this frees."""
    client = ui.context.client

    async def delete() -> None:
        server = ModelServer(runs)
        if server.run_name == run.name and server.process.is_running:
            raise UserError(f"The model of {run.name} is being served: stop the server first.")
        await asyncio.to_thread(runs.delete, run)
        client.open("/")

    async def ask() -> None:
        sizes = await asyncio.to_thread(run.sizes)
        question.text = f"Delete {run.name}? This frees {size_in_words(sizes.total)}."
        asked.set_visibility(True)

    async def keep() -> None:
        asked.set_visibility(False)

    second_button("Delete", ask)
    with tag("div", classes="row-of-buttons asked") as asked:
        question = text("p", "", role="alert")
        ui.button("Delete it", on_click=told(delete), color="negative")
        second_button("Keep it", keep)
    asked.set_visibility(False)
