"""Show all runs of the list, how far they are, and what they take of the disk."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

from nicegui import ui

from dreambooth.limits import size_in_words
from dreambooth.process import gpu_driver
from dreambooth.runs.run_folder import RunState
from dreambooth.runs.run_list import RunList
from dreambooth.runs.run_status import RunStatus
from dreambooth.studio import drafts, parts
from dreambooth.studio.routes import run_address

_HEADS: Final = ("Run", "State", "Step", "Loss", "Model", "Size")


def draw(runs: RunList, model: str | None) -> Callable[[], Awaitable[None]]:
    """Draw the list, and return the function that brings it up to date."""
    parts.text("h1", "Runs")
    for sentence in _about_the_machine(model):
        parts.text("p", sentence, classes="note")

    async def new() -> None:
        contents = drafts.contents_at_first(model)
        made = await asyncio.to_thread(runs.new_draft, contents, name=(name.value or "").strip())
        ui.navigate.to(run_address(made.name))

    async def start() -> None:
        await asyncio.to_thread(runs.start)

    with parts.tag("div", classes="row-of-buttons"):
        name = (
            ui.input("Name of a new run (optional)")
            .props("outlined dense stack-label maxlength=70")
            .classes("named")
        )
        ui.button("New run", on_click=parts.told(new))
    idle = parts.tag("div", classes="row-of-buttons")
    with idle:
        parts.text("p", "Runs wait, and nothing executes them.")
        ui.button("Execute them", on_click=parts.told(start))
    idle.set_visibility(False)
    total = parts.text("p", "", classes="note")
    place = parts.tag("div")
    cells: dict[str, list[Any]] = {}

    async def update() -> None:
        found = await asyncio.to_thread(runs.statuses)
        if [status.name for status in found] != [*cells]:
            cells.clear()
            place.clear()
            with place:
                cells.update(_rows(found))
        for status in found:
            for cell, content in zip(cells[status.name], _cells(status), strict=True):
                cell.text = content
        size = sum(status.sizes.total for status in found)
        total.text = f"{size_in_words(size)} in {runs.folder}" if found else "There is no run yet."
        waits = any(status.state == RunState.WAITING for status in found)
        idle.set_visibility(waits and not runs.has_runner())

    return update


def _about_the_machine(model: str | None) -> list[str]:
    sentences = []
    if not gpu_driver.inspect_machine().gpus:
        sentences.append(
            "This machine shows no GPU. The embedded model trains within a minute all the same; "
            "a Stable Diffusion model would take hours."
        )
    if model is None:
        sentences.append(
            "The page was started without a base model (--model), so new runs begin with the "
            "embedded one. Each run's form takes another one."
        )
    return sentences


def _rows(found: list[RunStatus]) -> dict[str, list[Any]]:
    """Draw one row per run; return the cells that change, by the run's name."""
    rows = {}
    with parts.scrolled("all runs"), parts.tag("table", classes="list"):
        with parts.tag("thead"), parts.tag("tr"):
            for head in _HEADS:
                parts.text("th", head, scope="col")
        with parts.tag("tbody"):
            for status in found:
                with parts.tag("tr"):
                    with parts.tag("td"):
                        ui.link(status.name, run_address(status.name))
                    rows[status.name] = [parts.text("td", "") for _ in _HEADS[1:]]
    return rows


def _cells(status: RunStatus) -> list[str]:
    return [
        f"{status.state}, stopping" if status.stopping else str(status.state),
        f"{status.step} of {status.steps}" if status.steps else "",
        "" if status.loss is None else f"{status.loss:.4f}",
        "yes" if status.has_model else "",
        size_in_words(status.sizes.total),
    ]
