"""Show what can be done with a run's model: download it, serve it here, or go on elsewhere."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Final

from nicegui import ui

from dreambooth.limits import LIMITS
from dreambooth.process import gpu_driver
from dreambooth.runs.run_folder import Run
from dreambooth.runs.run_list import RunList
from dreambooth.studio import drafts, parts, shipping
from dreambooth.studio.model_server import PICTURE, ModelServer, ServerState
from dreambooth.studio.routes import run_address

_FIELD: Final = "outlined dense stack-label"


def draw(runs: RunList, run: Run) -> Callable[[], Awaitable[None]]:
    """Draw the sections, and return the function that brings them up to date."""
    with parts.tag("div") as shown:
        _downloads(run)
        update_server = _server(runs, run)
        _elsewhere(run)
    shown.set_visibility(False)

    async def update() -> None:
        has_model = run.has_model()
        shown.set_visibility(has_model)
        if has_model:
            await update_server()

    return update


def _downloads(run: Run) -> None:
    with parts.tag("section"):
        parts.text("h2", "Download")
        parts.text(
            "p",
            "Each is made when it is asked for: the archive on the way, the one file before the "
            "download begins, which takes the size of the model on the disk meanwhile.",
            classes="note",
        )
        with parts.tag("ul"):
            for label, file in (
                ("model.tar.gz, of which an endpoint is made", "model.tar.gz"),
                ("one safetensors file, for other tools", "model.safetensors"),
                ("the same in half precision", "model.safetensors?precision=fp16"),
            ):
                with parts.tag("li"):
                    parts.text("a", label, href=f"{run_address(run.name)}/{file}", download=True)


def _server(runs: RunList, run: Run) -> Callable[[], Awaitable[None]]:
    """Draw the server's section, and return the function that brings it up to date."""
    server = ModelServer(runs)
    prompt_at_first, _ = drafts.prompts_of(run)

    async def start() -> None:
        await asyncio.to_thread(server.start, run)

    async def stop() -> None:
        await asyncio.to_thread(server.stop)

    async def ask() -> None:
        await asyncio.to_thread(server.ask, prompt.value or "", (seed.value or "").strip())

    with parts.tag("section"):
        parts.text("h2", "Serve")
        sentence = parts.text("p", "", role="status")
        with parts.tag("div", classes="row-of-buttons"):
            start_button = ui.button("Start the server", on_click=parts.told(start))
            stop_button = parts.second_button("Stop the server", stop)
        with parts.tag("div") as ready:
            prompt = ui.input("Prompt of a request", value=prompt_at_first)
            prompt.props(f"{_FIELD} maxlength={LIMITS.max_prompt_characters}").classes("wide")
            with parts.tag("div", classes="row-of-buttons"):
                seed = ui.input("Seed of a request", placeholder="random", value="7")
                seed.props(f"{_FIELD} maxlength=20 inputmode=numeric").classes("short")
                ui.button("Send the request", on_click=parts.told(ask))
            parts.text("p", "The same request from a shell:", classes="note")
            curl = parts.copied("the request for a shell", "")
            parts.text(
                "p",
                "From another machine, first open a way to this one (its name may be another "
                "one there):",
                classes="note",
            )
            way = parts.copied("the way to the server", "")
            place = parts.tag("div", classes="pictures large")
    drawn: object = None

    async def update() -> None:
        nonlocal drawn
        state = await asyncio.to_thread(server.state)
        is_active = state in (ServerState.LOADING, ServerState.READY, ServerState.STOPPING)
        is_ours = server.run_name == run.name
        sentence.text = _sentence(server, state, is_ours)
        start_button.set_visibility(not is_active)
        stop_button.set_visibility(is_active)
        stop_button.set_enabled(state != ServerState.STOPPING)
        ready.set_visibility(state == ServerState.READY and is_ours)
        port = server.port or 0
        digits = (seed.value or "").strip()
        curl.text = shipping.request(
            prompt.value or "", digits if digits.isdecimal() else "", port=port
        ).rstrip()
        way.text = f"ssh -L {port}:127.0.0.1:{port} {socket.gethostname()}"
        asked = server.asked()
        if asked != drawn:
            drawn = asked
            place.clear()
            if asked is not None:
                with place:
                    _picture(*asked)

    return update


def _picture(prompt: str, facts: str, changed: int) -> None:
    with parts.tag("figure"):
        parts.tag("img", src=f"/server/{PICTURE}?{changed}", alt=f"served: {prompt}")
        parts.text("figcaption", f"{prompt} ({facts})")


def _sentence(server: ModelServer, state: ServerState, is_ours: bool) -> str:
    whose = "this model" if is_ours else f"the model of {server.run_name}"
    return {
        ServerState.NONE: "No server runs. It answers on a free port of this machine alone.",
        ServerState.LOADING: f"A server of {whose} is loading.",
        ServerState.READY: f"A server of {whose} answers at http://127.0.0.1:{server.port}.",
        ServerState.STOPPING: f"The server of {whose} finishes what it draws, and ends.",
        ServerState.STOPPED: "The server was stopped.",
        ServerState.DIED: f"The server of {whose} ended by itself: {server.process.last_line()}",
    }[state]


def _elsewhere(run: Run) -> None:
    has_gpu = gpu_driver.inspect_machine().gpus > 0
    with parts.tag("section"):
        parts.text("h2", "Elsewhere")
        for sentence, label, content in (
            (
                "With Docker, in the project's folder:",
                "Docker",
                shipping.docker(run, has_gpu=has_gpu),
            ),
            ("Without it:", "the server", shipping.serve(run)),
            (
                "The same training on SageMaker: bring the image to ECR (the README says how), "
                "and the pictures and the base model to S3:",
                "S3",
                shipping.uploads(run),
            ),
            (
                "Then train and deploy with SageMaker's SDK (2.x):",
                "SageMaker",
                shipping.sagemaker(run),
            ),
        ):
            parts.text("p", sentence, classes="note")
            parts.copied(label, content.rstrip())
