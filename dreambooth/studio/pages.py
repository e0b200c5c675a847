"""Build the page: its addresses, its frame, and what is polled while it is open.

The page holds no state. Every open page reads the run folders once a second and changes what it
shows, so that a reload, a second browser, a page that was started anew and a run from the command
line all show the same.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Final

from fastapi import FastAPI
from nicegui import app as application
from nicegui import ui
from starlette.types import ASGIApp

from dreambooth.errors import DreamBoothError, UserError
from dreambooth.runs.run_folder import RunState
from dreambooth.runs.run_list import RunList
from dreambooth.studio import draft_form, generate_view, list_view, parts, run_view
from dreambooth.studio.drawings import Drawings
from dreambooth.studio.routes import routes

POLL_S: Final = 1.0

_TITLE: Final = "DreamBooth studio"
_HEAD: Final = (
    '<link rel="stylesheet" href="/static/studio.css">'
    '<script defer src="/static/upload.js"></script>'
)

log = logging.getLogger(__name__)


def build(runs: RunList, model: str | None) -> ASGIApp:
    """Return the page as an ASGI application. model: what new runs start from, if it was given."""
    app: ASGIApp = FastAPI(openapi_url=None, routes=[*routes(runs)])

    def all_runs() -> None:
        with _frame():
            update = list_view.draw(runs, model)
        _poll(update)

    def one_run(name: str) -> None:
        with _frame() as frame:
            pass
        _poll(_one_run(frame, runs, name))

    def generate() -> None:
        with _frame():
            update = generate_view.draw(Drawings(runs, model))
        _poll(update)

    ui.page("/", title=_TITLE)(all_runs)
    ui.page("/generate", title=_TITLE)(generate)
    ui.page("/runs/{name}", title=_TITLE)(one_run)
    # A bar that the library shows during requests; it has no name for those who cannot see it.
    application.config.quasar_config["loadingBar"]["skipHijack"] = True
    ui.run_with(
        app,
        title=_TITLE,
        dark=None,  # as the browser is set
        language="en-US",
        tailwind=False,
        show_welcome_message=False,
    )
    return app


def _poll(update: Callable[[], Awaitable[None]]) -> None:
    """Bring the page up to date once a second; one update ends before the next begins."""

    async def poll() -> None:
        try:
            await update()
        except (DreamBoothError, OSError) as error:
            # Mostly what was read has just been deleted, and the next look finds that out.
            log.debug("the page could not be brought up to date: %s", error)

    ui.timer(POLL_S, poll)


def _frame() -> ui.element:
    ui.add_head_html(_HEAD)
    ui.colors(primary="#2461c9", negative="#b42318", positive="#1b7a43")
    with parts.tag("header", classes="studio-header"):
        ui.link(_TITLE, "/")
        with parts.tag("nav"):
            ui.link("Runs", "/")
            ui.link("Generate", "/generate")
    return parts.tag("div", classes="studio")  # the library's own `main` is around it


def _one_run(frame: ui.element, runs: RunList, name: str) -> Callable[[], Awaitable[None]]:
    """Return the function that shows a run as it is: a form, how far it is, or that it is gone."""
    drawn: str | None = None
    update: Callable[[], Awaitable[None]] = _nothing

    async def show() -> None:
        nonlocal drawn, update
        try:
            run = runs.run(name)
            kind = "draft" if run.state() == RunState.DRAFT else "run"
        except UserError:
            kind = "gone"
        if kind != drawn:
            drawn = kind
            frame.clear()
            with frame:
                if kind == "gone":
                    parts.text("h1", "There is no such run")
                    ui.link("All runs", "/")
                    update = _nothing
                elif kind == "draft":
                    update = draft_form.draw(runs, run)
                else:
                    update = run_view.draw(runs, run)
        await update()

    return show


async def _nothing() -> None:
    pass
