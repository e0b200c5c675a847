"""The server that the page starts, and the downloads of a model."""

from __future__ import annotations

import asyncio
import io
import os
import shutil
import signal
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open
from starlette.applications import Starlette

from dreambooth.errors import UserError
from dreambooth.model_folder import pack
from dreambooth.runs.run_folder import Run
from dreambooth.runs.run_list import RunList
from dreambooth.studio import downloads, routes
from dreambooth.studio.model_server import ModelServer, ServerState
from dreambooth.studio.own_process import object_of
from dreambooth.tiny import WEIGHTS
from tests.studio.asgi import send

LONG_S = 300  # only guards against a hang


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture
def runs(tmp_path: Path) -> RunList:
    return RunList(tmp_path / "runs")


@pytest.fixture
def run(runs: RunList) -> Run:
    made = runs.new_draft({}, name="cat")
    shutil.copytree(WEIGHTS, made.folder / "model")
    return made


def test_a_model_is_served_asked_and_stopped_by_whoever_looks(runs: RunList, run: Run) -> None:
    server = ModelServer(runs)
    assert server.state() == ServerState.NONE
    with pytest.raises(UserError, match="No server runs"):
        server.ask("a cat", "7")
    server.stop()
    server.start(run)
    with pytest.raises(UserError, match="The model of 0001-cat is being served"):
        server.start(run)
    wait_until(lambda: server.state() == ServerState.READY)
    server.ask("a photo of a cat", "7")
    asked = server.asked()
    assert asked is not None
    assert asked[0] == "a photo of a cat"
    assert asked[1].startswith("seed=7, seconds=")
    shown = send(Starlette(routes=routes.routes(runs)), "GET", "/server/picture.png")
    with Image.open(io.BytesIO(shown.body)) as image:
        assert image.size == (64, 64)
    with pytest.raises(UserError, match="The server answered 400: "):
        server.ask("x" * 5_000, "7")
    with pytest.raises(UserError, match="must be a whole number"):
        server.ask("a cat", "seven")
    ModelServer(runs).stop()  # all that is known lies in the folder
    wait_until(lambda: server.state() == ServerState.STOPPED)
    assert server.run_name == "0001-cat"


def test_a_server_that_dies_is_gone(runs: RunList, run: Run) -> None:
    server = ModelServer(runs)
    server.start(run)
    os.kill(object_of(server.folder / "process.json")["pid"], signal.SIGKILL)
    wait_until(lambda: server.state() == ServerState.DIED)
    (run.folder / "model" / "unet" / "config.json").write_text("{")
    server.start(run)
    wait_until(lambda: server.state() == ServerState.DIED)
    assert "cannot be served" in server.process.log()


def test_what_has_no_model_is_neither_served_nor_sent(runs: RunList) -> None:
    run = runs.new_draft({})
    with pytest.raises(UserError, match="no model yet"):
        ModelServer(runs).start(run)
    app = Starlette(routes=routes.routes(runs))
    for name in ("model.tar.gz", "model.safetensors"):
        assert send(app, "GET", f"/runs/{run.name}/{name}").status == 404
    assert send(app, "GET", "/server/picture.png").status == 404


def test_the_archive_is_that_of_pack(runs: RunList, run: Run, tmp_path: Path) -> None:
    pack.write(str(run.folder / "model"), tmp_path / "model.tar.gz")
    app = Starlette(routes=routes.routes(runs))
    reply = send(app, "GET", "/runs/0001-cat/model.tar.gz")
    assert reply.body == (tmp_path / "model.tar.gz").read_bytes()
    assert reply.headers["content-disposition"] == 'attachment; filename="model.tar.gz"'


def test_a_model_that_cannot_be_packed_is_said(runs: RunList, run: Run) -> None:
    (run.folder / "model" / "model_index.json").write_text("{}")
    reply = send(Starlette(routes=routes.routes(runs)), "GET", "/runs/0001-cat/model.tar.gz")
    assert reply.status == 404
    assert "error" in reply.json


def test_an_archive_that_breaks_off_is_no_whole_reply(run: Run) -> None:
    async def received() -> bytes:
        response = await downloads.archive(run)
        (run.folder / "model" / "vae" / "config.json").unlink()
        return b"".join([chunk async for chunk in response.body_iterator])  # type: ignore[attr-defined]

    with pytest.raises(Exception, match=r"config\.json"):
        asyncio.run(received())


def test_a_reader_who_leaves_ends_the_packing(run: Run) -> None:
    async def leave() -> None:
        response = await downloads.archive(run)
        chunks = response.body_iterator  # type: ignore[attr-defined]
        await anext(chunks)
        await chunks.aclose()

    asyncio.run(leave())  # it waits for the thread that packs


def test_one_file_is_made_in_both_precisions_and_kept_nowhere(runs: RunList, run: Run) -> None:
    app = Starlette(routes=routes.routes(runs))
    before = sorted(run.folder.rglob("*"))
    reply = send(app, "GET", "/runs/0001-cat/model.safetensors?precision=fp16")
    assert reply.status == 200
    assert reply.headers["content-disposition"] == 'attachment; filename="0001-cat.safetensors"'
    assert int(reply.headers["content-length"]) == len(reply.body)
    assert sorted(run.folder.rglob("*")) == before
    file = run.folder.parent / "one.safetensors"
    file.write_bytes(reply.body)
    with safe_open(str(file), "np") as opened:
        weight = opened.get_tensor("model.diffusion_model.input_blocks.0.0.weight")
        assert weight.dtype == "float16"
    assert send(app, "GET", "/runs/0001-cat/model.safetensors?precision=x").status == 404


def test_the_archive_holds_the_model(runs: RunList, run: Run) -> None:
    reply = send(Starlette(routes=routes.routes(runs)), "GET", "/runs/0001-cat/model.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(reply.body)) as tar:
        assert "unet/diffusion_pytorch_model.safetensors" in tar.getnames()
