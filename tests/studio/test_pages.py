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
from starlette.applications import Starlette

from dreambooth.errors import UserError
from dreambooth.runs import run_folder
from dreambooth.runs.run_folder import Run, RunState
from dreambooth.runs.run_list import RunList
from dreambooth.settings.studio_options import StudioSettings
from dreambooth.studio import start
from dreambooth.studio.access import Access
from dreambooth.studio.drawings import Drawings
from dreambooth.studio.model_server import ModelServer
from dreambooth.tiny import DATA, WEIGHTS
from tests.studio.asgi import send
from tests.studio.needed import needed

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium")
LONG_MS = 600_000  # only guards against a hang


def test_without_its_library_the_page_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nicegui", None)
    with pytest.raises(UserError, match="needs NiceGUI, which is not installed: run `make studio`"):
        start.run(StudioSettings(dir=tmp_path / "runs"))
    assert list(tmp_path.iterdir()) == []


class Studio:
    """The page as a process of its own."""

    def __init__(self, runs: RunList) -> None:
        self.runs = runs
        self.port = "0"
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "dreambooth", "studio", "--port", self.port),
                *("--dir", str(self.runs.folder)),
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:([0-9]+)", self.process.stdout.readline())
        assert found is not None
        self.address, self.port = found[0], found[1]

    def kill_and_start(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.start()

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=60)
        assert self.process.returncode == 0


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[Studio]:
    needed("nicegui")
    started = Studio(RunList(tmp_path / "runs"))
    yield started
    started.end()


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
    studio: Studio,
) -> None:
    address = studio.address
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

    def refused(said: Any) -> bool:
        return said.type == "error" and "Content Security Policy" in said.text

    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])

        def opened() -> Any:
            page = browser.new_page()
            page.set_default_timeout(LONG_MS)
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.on("console", lambda said: faults.append(said.text) if refused(said) else None)
            page.on("request", lambda request: requested.append(request.url))
            return page

        requested: list[str] = []
        yield opened
        browser.close()
    assert faults == []
    hosts = {urlsplit(url).hostname for url in requested if not url.startswith("data:")}
    assert hosts <= {"127.0.0.1"}


_NOTHING_FADES = """() => document.getAnimations().every(
  (one) => one.playState !== "running" || one.effect.getTiming().iterations === Infinity
)"""


def anyone_can_use(page: Any) -> None:
    """Let axe look for what keeps people from using the page as it is shown, light and dark."""
    axe = needed("axe_playwright_python.sync_playwright").Axe()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_timeout(200)
        page.wait_for_function(_NOTHING_FADES)
        found = axe.run(page).response["violations"]
        assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found] == []
    page.emulate_media(color_scheme="light")


def choose_an_earlier_state(page: Any, second: Any, run: Run) -> None:
    """Slide to the first state with the keyboard, let it draw, and make it the model."""
    slider = page.get_by_role("slider", name="State")
    slider.wait_for()
    assert slider.get_attribute("aria-valuetext") == "step 80 (the model now)"
    assert page.get_by_role("button", name="Keep this one").is_disabled()
    slider.focus()
    page.keyboard.press("Home")
    page.get_by_text("step 40 (the model now is that of 80)").wait_for()
    assert slider.get_attribute("aria-valuetext").startswith("step 40 ")
    page.get_by_role("columnheader", name="step 80, the model now").wait_for()
    page.get_by_role("button", name="Draw this state").click()
    page.get_by_role("button", name="Cancel the drawing").wait_for()
    page.reload()
    for shown in (page, second):
        slider = shown.get_by_role("slider", name="State")
        slider.wait_for()
        slider.press("Home")
        for prompt in ("a photo of a riobugger cat on a beach", "a photo of a dog"):
            for title in ("base", "step 40", "step 80, the model now"):
                shown.get_by_role("img", name=f"{title}: {prompt}", exact=True).wait_for()
    page.get_by_role("button", name="Cancel the drawing").wait_for(state="hidden")
    page.get_by_role("row", name="The subject is drawn").wait_for()
    anyone_can_use(page)
    weights = run.folder / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    page.get_by_role("button", name="Keep this one").click()
    page.get_by_text("The model is being replaced.").wait_for()
    page.reload()
    for shown in (page, second):
        shown.get_by_text("Since then the state of step 40 was chosen as its model.").wait_for()
    assert weights.read_bytes() != before
    assert run.model_info()["steps"] == 40
    assert len(Drawings(RunList(run.folder.parent), None).all()) == 3
    slider = page.get_by_role("slider", name="State")
    slider.press("End")
    page.get_by_role("img", name="step 40, the model now: a photo of a dog").wait_for()
    page.get_by_role("img", name="step 80: a photo of a dog", exact=True).wait_for()


def test_the_story_from_pictures_to_a_model(
    studio: Studio, browse: Callable[[], Any], tmp_path: Path
) -> None:
    address, runs = studio.address, studio.runs
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

    page.get_by_label("Steps").first.fill("80")
    page.get_by_text("All settings").click()
    page.get_by_label("Search the settings").fill("every so many steps")
    page.get_by_label("sample_steps").fill("20")
    run = runs.run("0001-cat")
    page.wait_for_timeout(1_500)
    assert run.draft()["settings"]["max_steps"] == "80"
    assert run.draft()["settings"]["sample_steps"] == "20"
    page.reload()
    assert page.get_by_label("Instance prompt").input_value() == "a photo of a riobugger cat"
    page.get_by_role("button", name="Show the plan").click()
    page.get_by_role("cell", name="80 (10 epochs of 8 instance images)").wait_for()
    page.get_by_role("cell", name="not known for such a job").wait_for()
    page.get_by_role("button", name="Measure the time").click()
    page.get_by_role("cell", name="measured with 5 steps of this job").wait_for()
    anyone_can_use(page)

    page.get_by_role("button", name="Start").click()
    page.get_by_role("button", name="Stop").wait_for()
    page.get_by_role("img", name="the loss over the steps").wait_for()
    studio.kill_and_start()
    second = browse()
    second.goto(page.url)
    second.get_by_text("The numbers of the curve").click()
    second.get_by_role("columnheader", name="Learning rate").wait_for()
    page.reload()
    for shown in (page, second):
        shown.get_by_text("It is done.").wait_for()
        shown.get_by_role("img", name="sample after step 80").wait_for()
    assert run.state() == RunState.DONE
    assert run.has_model()

    # A run with pictures of the meter leaves such files.
    (run.folder / "meter").mkdir()
    for step, key in ((0, "subject"), (0, "other_class"), (20, "subject"), (20, "class")):
        shutil.copy(
            DATA / "cat" / "riobugger_00.png", run.folder / "meter" / f"step-{step:06}-{key}.png"
        )
    for step, key in ((0, "other class"), (20, "subject")):
        page.get_by_role("heading", name=f"Step {step}", exact=True).wait_for()
        page.get_by_role("img", name=f"{key} after step {step}").wait_for()
    (run.folder / "meter" / "scores.json").write_text('{"20": {"class_kept": 0.5}}')
    page.get_by_text("class kept 0.50").wait_for()

    choose_an_earlier_state(page, second, run)

    page.get_by_label("One more prompt").fill("a photo of a dog")
    page.get_by_label("Steps of both").fill("3")
    page.get_by_role("button", name="Draw with both").click()
    page.get_by_role("button", name="Cancel the comparison").wait_for()
    page.get_by_text("Fine-tuned: It waits for the others.").wait_for()
    page.reload()
    compared = page.locator("section").filter(has_text="Compare with the base model")
    for prompt in ("a photo of a riobugger cat on a beach", "a photo of a cat", "a photo of a dog"):
        for whose in ("base", "fine-tuned"):
            compared.get_by_role("img", name=f"{whose}: {prompt}", exact=True).wait_for()

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
    anyone_can_use(page)
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
    anyone_can_use(page)
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
    assert page.get_by_label("Steps").first.input_value() == "80"
    for _ in range(2):
        page.get_by_role("button", name="Delete").click()
        page.get_by_role("button", name="Delete it").wait_for()
        anyone_can_use(page)
        page.get_by_role("button", name="Delete it").click()
        page.wait_for_url(f"{address}/")
        page.goto(second.url)
    page.goto(address)
    page.get_by_text("There is no run yet.").wait_for()
    anyone_can_use(page)
    second.get_by_text("There is no such run").wait_for()
    assert runs.runs() == []


def test_a_page_that_is_killed_loses_nothing(studio: Studio, browse: Callable[[], Any]) -> None:
    runs = studio.runs
    run = runs.new_draft({"instance_prompt": "a photo of a riobugger cat"})
    served = runs.new_draft({}, name="served")
    shutil.copytree(WEIGHTS, served.folder / "model")
    served.write_settings({"train": "pictures", "pretrained_model": "tiny"})
    (served.folder / "exit_code").write_text("0")
    page, second = browse(), browse()
    second.goto(f"{studio.address}/runs/{served.name}")
    second.get_by_role("button", name="Start the server").click()
    second.get_by_role("button", name="Send the request").wait_for()
    page.goto(f"{studio.address}/runs/{run.name}")
    page.get_by_label("Class prompt").fill("a photo of a cat")
    page.wait_for_timeout(1_500)
    studio.kill_and_start()
    page.reload()
    page.get_by_label("Class prompt").wait_for()
    page.wait_for_timeout(1_500)
    assert page.get_by_label("Class prompt").input_value() == "a photo of a cat"
    # What somebody else stores is shown as well.
    run.save_draft({**run.draft(), "class_prompt": "a photo of a dog"})
    page.wait_for_timeout(2_000)
    assert page.get_by_label("Class prompt").input_value() == "a photo of a dog"
    assert run.draft()["class_prompt"] == "a photo of a dog"
    assert not (run.folder / run_folder.LOCK).read_bytes()

    second.reload()
    second.get_by_role("button", name="Delete").click()
    second.get_by_role("button", name="Delete it").click()
    second.get_by_text("is being served: stop the server first").wait_for()
    second.get_by_role("button", name="Stop the server").click()
    second.get_by_text("The server was stopped.").wait_for()
    assert not ModelServer(runs).process.is_running


def test_bad_uploads_get_a_sentence(
    studio: Studio, browse: Callable[[], Any], tmp_path: Path
) -> None:
    run = studio.runs.new_draft({})
    page = browse()
    page.goto(f"{studio.address}/runs/{run.name}")
    chooser = page.get_by_label("Drop 4 to 20 pictures")
    huge = tmp_path / "huge.png"
    Image.new("1", (12_000, 12_000)).save(huge)
    chooser.set_input_files(huge)
    page.get_by_role("alert").filter(has_text="huge.png is 12000 x 12000, more than").wait_for()
    many = []
    for number in range(200):
        many.append(tmp_path / f"{number}.png")
        Image.new("RGB", (8, 8), (number, 0, 0)).save(many[-1])
    chooser.set_input_files(many)
    page.get_by_text("90 more were not taken.").wait_for()
    said = page.get_by_role("alert").filter(has_text="at most 100 uploaded pictures")
    assert said.first.is_visible()
    page.get_by_text("100 pictures, shown as training sees them").wait_for()
    page.goto(f"{studio.address}/runs/none")
    page.get_by_text("There is no such run").wait_for()
    anyone_can_use(page)
    page.goto(studio.address)
    page.get_by_role("link", name=run.name).wait_for()
    anyone_can_use(page)


@pytest.fixture
def login_page() -> str:
    app = Access(Starlette(), password="correct horse battery")
    return send(app, "GET", "/").body.decode()


def test_anyone_can_use_the_form_for_the_password(
    login_page: str, browse: Callable[[], Any]
) -> None:
    page = browse()
    page.set_content(login_page)
    page.get_by_label("Password").wait_for()
    anyone_can_use(page)


_FOCUSED = """() => {
  const one = document.activeElement;
  const name = one.getAttribute("aria-label") || one.labels?.[0]?.innerText || one.innerText || "";
  return name.trim().split("\\n")[0];
}"""


def tab_to(page: Any, name: str) -> None:
    """Press Tab until what has this name has the focus, which must be seen."""
    names: list[str] = []
    for _ in range(150):
        page.keyboard.press("Tab")
        names.append(page.evaluate(_FOCUSED))
        if names[-1].startswith(name):
            return
    raise AssertionError(f"{name} has no focus: {names}")


def test_the_keyboard_alone_suffices(studio: Studio, browse: Callable[[], Any]) -> None:
    page = browse()
    page.goto(studio.address)
    page.get_by_text("There is no run yet.").wait_for()
    tab_to(page, "Name of a new run")
    page.keyboard.type("keys")
    tab_to(page, "New run")
    page.keyboard.press("Enter")
    page.wait_for_url("**/runs/0001-keys")
    page.get_by_label("Class prompt").wait_for()
    tab_to(page, "Drop 4 to 20 pictures")
    tab_to(page, "Face")
    page.keyboard.press("Enter")
    page.get_by_text("800 steps with prior preservation").wait_for()
    tab_to(page, "Class prompt")
    page.keyboard.press("Control+A")
    page.keyboard.type("a photo of a dog")
    tab_to(page, 'Expand "All settings"')
    page.keyboard.press("Enter")
    page.get_by_label("Search the settings").wait_for()
    tab_to(page, "Search the settings")
    page.keyboard.type("mixed_precision")
    tab_to(page, "mixed_precision")
    page.keyboard.press("Enter")
    page.get_by_role("option", name="bf16").wait_for()
    page.keyboard.type("bf16")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    tab_to(page, "Show the plan")
    page.keyboard.press("Enter")
    page.get_by_role("alert").filter(has_text="0001-keys").wait_for()
    draft = studio.runs.run("0001-keys").draft()
    assert draft["class_prompt"] == "a photo of a dog"
    assert draft["settings"]["max_steps"] == "800"
    tab_to(page, "Delete")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Delete it").wait_for()
    tab_to(page, "Delete it")
    page.keyboard.press("Enter")
    page.get_by_text("There is no run yet.").wait_for()
