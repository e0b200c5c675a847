"""The page as it is served, and its story in a browser (`make test-studio`)."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image

from dreambooth.errors import UserError
from dreambooth.runs import run_folder
from dreambooth.runs.run_folder import RunState
from dreambooth.runs.run_list import RunList
from dreambooth.settings.studio_options import StudioSettings
from dreambooth.studio import start
from dreambooth.tiny import DATA
from tests.studio.needed import needed

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium")
LONG_MS = 240_000  # only guards against a hang


def test_without_its_library_the_page_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nicegui", None)
    with pytest.raises(UserError, match="needs NiceGUI, which is not installed: run `make studio`"):
        start.run(StudioSettings(dir=tmp_path / "runs"))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, RunList]]:
    needed("nicegui")
    runs = RunList(tmp_path / "runs")
    process, address = started(runs)
    yield address, runs
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 0


def started(runs: RunList, port: str = "0") -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "dreambooth", "studio", "--port", port),
            *("--dir", str(runs.folder)),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    found = re.search(r"http://127\.0\.0\.1:[0-9]+", process.stdout.readline())
    assert found is not None
    return process, found[0]


def raw(address: str, method: str, target: str, *headers: str) -> tuple[int, str]:
    """Send one request with these headers alone; return the status and the reply."""
    place = urlsplit(address)
    with socket.create_connection((place.hostname, place.port), 60) as connection:
        upgrade = any(header.startswith("Upgrade") for header in headers)
        connection_header = f"Connection: {'Upgrade' if upgrade else 'close'}"
        lines = [f"{method} {target} HTTP/1.1", *headers, connection_header, "", ""]
        connection.sendall("\r\n".join(lines).encode())
        reply = b""
        while chunk := connection.recv(65_536):
            reply += chunk
            if b" 101 " in reply[:20]:
                break
    return int(reply.split()[1]), reply.decode("utf-8", "replace")


def test_the_served_page_refuses_foreign_sites_and_names_no_other(
    server: tuple[str, RunList],
) -> None:
    address, _ = server
    own = address.removeprefix("http://")
    status, page = raw(address, "GET", "/", f"Host: {own}")
    assert status == 200
    assert '<html lang="en-US">' in page
    assert set(re.findall(r"(?:src|href)=\"(https?:[^\"]*)", page)) == set()
    assert '@import url("http' not in page
    assert raw(address, "GET", "/", "Host: evil.example")[0] == 403
    asked = "/_nicegui_ws/socket.io/?EIO=4&transport="
    sockets = (
        "Upgrade: websocket",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version: 13",
    )
    for host, origin, expected in (
        (own, f"http://{own}", 101),
        (own, "http://evil.example", 403),
        (own, "null", 403),
        ("evil.example", "http://evil.example", 403),
        (own.replace("127.0.0.1", "evil.example"), f"http://{own}", 403),
    ):
        named = (f"Host: {host}", f"Origin: {origin}")
        assert raw(address, "GET", f"{asked}websocket", *named, *sockets)[0] == expected
        if expected == 403:
            status, reply = raw(address, "GET", f"{asked}polling", *named)
            assert status == 403
            assert "access-control-allow-origin" not in reply.lower()


@pytest.fixture
def browse() -> Iterator[Callable[[], Any]]:
    """Yield a function that opens a new page in a browser; none may have an error of a script."""
    api = needed("playwright.sync_api")
    if CHROMIUM is None:
        if os.environ.get("DREAMBOOTH_STUDIO_TESTS"):
            pytest.fail("there is no `chromium` on the path")
        pytest.skip("there is no `chromium` on the path")
    faults: list[str] = []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])

        def opened() -> Any:
            page = browser.new_page()
            page.set_default_timeout(LONG_MS)
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.on("request", lambda request: requested.append(request.url))
            return page

        requested: list[str] = []
        yield opened
        browser.close()
    assert faults == []
    hosts = {urlsplit(url).hostname for url in requested if not url.startswith("data:")}
    assert hosts <= {"127.0.0.1"}


def test_the_story_from_pictures_to_a_model(
    server: tuple[str, RunList], browse: Callable[[], Any], tmp_path: Path
) -> None:
    address, runs = server
    page = browse()
    page.goto(address)
    page.get_by_text("There is no run yet.").wait_for()
    page.get_by_label("Name of a new run").fill("cat")
    page.get_by_role("button", name="New run").click()
    page.wait_for_url("**/runs/0001-cat")

    chooser = page.get_by_label("Drop 4 to 20 pictures")
    bad = tmp_path / "<img src=x onerror=alert(1)>.png"
    bad.write_text("these are my notes")
    chooser.set_input_files([bad, *sorted((DATA / "cat").glob("*.png"))])
    page.get_by_text("8 pictures, shown as training sees them: 64 x 64").wait_for()
    said = page.get_by_role("alert").filter(has_text="holds no known picture format")
    assert bad.name in said.inner_text()
    assert page.locator("img[src=x]").count() == 0

    page.get_by_label("Steps").first.fill("60")
    page.get_by_text("All settings").click()
    page.get_by_label("Search the settings").fill("every so many steps")
    page.get_by_label("sample_steps").fill("20")
    run = runs.run("0001-cat")
    page.wait_for_timeout(1_500)
    assert run.draft()["settings"]["max_steps"] == "60"
    assert run.draft()["settings"]["sample_steps"] == "20"
    page.reload()
    assert page.get_by_label("Instance prompt").input_value() == "a photo of a riobugger cat"
    page.get_by_role("button", name="Show the plan").click()
    page.get_by_role("cell", name="60 (7.5 epochs of 8 instance images)").wait_for()
    page.get_by_role("cell", name="not known for such a job").wait_for()
    page.get_by_role("button", name="Measure the time").click()
    page.get_by_role("cell", name="measured with 5 steps of this job").wait_for()

    page.get_by_role("button", name="Start").click()
    page.get_by_role("button", name="Stop").wait_for()
    page.get_by_role("img", name="the loss over the steps").wait_for()
    second = browse()
    second.goto(page.url)
    second.get_by_text("The numbers of the curve").click()
    second.get_by_role("columnheader", name="Learning rate").wait_for()
    page.reload()
    for shown in (page, second):
        shown.get_by_text("It is done.").wait_for()
        shown.get_by_role("img", name="sample after step 60").wait_for()
    assert run.state() == RunState.DONE
    assert run.has_model()

    # What draws fixed prompts while a run trains leaves such files.
    (run.folder / "meter").mkdir()
    for step, key in ((0, "subject"), (0, "a_beach"), (20, "subject"), (20, "a_beach")):
        shutil.copy(
            DATA / "cat" / "riobugger_00.png", run.folder / "meter" / f"step-{step:06}-{key}.png"
        )
    for step, key in ((0, "subject"), (20, "a beach")):
        page.get_by_role("heading", name=f"Step {step}", exact=True).wait_for()
        page.get_by_role("img", name=f"{key} after step {step}").wait_for()

    page.get_by_label("One more prompt").fill("a photo of a dog")
    page.get_by_label("Steps of both").fill("3")
    page.get_by_role("button", name="Draw with both").click()
    page.get_by_role("button", name="Cancel the comparison").wait_for()
    page.get_by_text("Fine-tuned: It waits for the others.").wait_for()
    page.reload()
    for prompt in ("a photo of a riobugger cat on a beach", "a photo of a cat", "a photo of a dog"):
        for whose in ("base", "fine-tuned"):
            page.get_by_role("img", name=f"{whose}: {prompt}", exact=True).wait_for()

    with page.expect_download() as download:
        page.get_by_role("link", name="model.tar.gz").click()
    with tarfile.open(download.value.path()) as tar:
        assert "unet/diffusion_pytorch_model.safetensors" in tar.getnames()
    with page.expect_download() as download:
        page.get_by_role("link", name="one safetensors file").click()
    assert download.value.suggested_filename == "0001-cat.safetensors"
    page.get_by_role("button", name="Start the server").click()
    prompt = page.get_by_label("Prompt of a request")
    prompt.wait_for()
    assert prompt.input_value() == "a photo of a riobugger cat"
    page.get_by_role("button", name="Send the request").click()
    page.get_by_role("img", name="served: a photo of a riobugger cat").wait_for()
    second.get_by_role("img", name="served: a photo of a riobugger cat").wait_for()
    second.get_by_role("button", name="Stop the server").click()
    page.get_by_text("The server was stopped.").wait_for()

    page.get_by_role("link", name="Generate").click()
    page.get_by_label("Prompt", exact=True).fill("a photo of a <b>riobugger</b> cat")
    for label, value in (("Steps", "4"), ("Pictures", "2"), ("Seed", "7")):
        page.get_by_label(label, exact=True).fill(value)
    page.wait_for_timeout(1_500)
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("2 were drawn.").wait_for()
    assert "run 0001-cat" in page.locator("section .note").inner_text()
    with page.expect_download() as download:
        page.get_by_role("link", name="Download the picture of seed 8").click()
    assert download.value.suggested_filename.endswith("_seed8.png")
    with Image.open(download.value.path()) as image:
        assert image.text["prompt"] == "a photo of a <b>riobugger</b> cat"
    page.get_by_label("Seed", exact=True).fill("9")
    page.wait_for_timeout(1_500)
    page.get_by_role("button", name="Use these again").click()
    page.wait_for_timeout(2_000)
    assert page.get_by_label("Seed", exact=True).input_value() == "7"
    page.get_by_role("button", name="Delete").click()
    page.get_by_text("2 were drawn.").wait_for(state="detached")

    page.goto(second.url)
    page.get_by_role("button", name="Change and run again").click()
    page.get_by_text("8 pictures, shown as training sees them").wait_for()
    page.get_by_label("Steps").first.wait_for()
    page.wait_for_timeout(1_500)
    assert page.get_by_label("Steps").first.input_value() == "60"
    for _ in range(2):
        page.get_by_role("button", name="Delete").click()
        page.get_by_role("button", name="Delete it").click()
        page.wait_for_url(f"{address}/")
        page.goto(second.url)
    page.goto(address)
    page.get_by_text("There is no run yet.").wait_for()
    second.get_by_text("There is no such run").wait_for()
    assert runs.runs() == []


def test_a_page_that_is_killed_loses_nothing(tmp_path: Path, browse: Callable[[], Any]) -> None:
    needed("nicegui")
    runs = RunList(tmp_path / "runs")
    run = runs.new_draft({"instance_prompt": "a photo of a riobugger cat"})
    process, address = started(runs)
    try:
        page = browse()
        page.goto(f"{address}/runs/{run.name}")
        page.get_by_label("Class prompt").fill("a photo of a cat")
        page.wait_for_timeout(1_500)
        process.kill()
        process.communicate()
        process, _ = started(runs, address.rpartition(":")[2])
        page.reload()
        page.get_by_label("Class prompt").wait_for()
        page.wait_for_timeout(1_500)
        assert page.get_by_label("Class prompt").input_value() == "a photo of a cat"
        # What somebody else stores is shown as well.
        run.save_draft({**run.draft(), "class_prompt": "a photo of a dog"})
        page.wait_for_timeout(2_000)
        assert page.get_by_label("Class prompt").input_value() == "a photo of a dog"
        assert run.draft()["class_prompt"] == "a photo of a dog"
    finally:
        process.kill()
        process.communicate()
    assert not (run.folder / run_folder.LOCK).read_bytes()
