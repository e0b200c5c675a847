"""The README's requests are sent, as they stand there, to a server."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
ADDRESS = "http://127.0.0.1:8080"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "dreambooth", "serve", "--model", "tiny"]
    with log.open("wb") as stream:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", "0"], cwd=ROOT, stderr=stream
        )
    try:
        end = time.monotonic() + 180
        while not ready(log):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port(log)}"
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def port(log: Path) -> str | None:
    found = re.search(r"127\.0\.0\.1:(\d+)|port (\d+)", log.read_text())
    return found and (found[1] or found[2])


def ready(log: Path) -> bool:
    number = port(log)
    if number is None:
        return False
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{number}/ping", timeout=2) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def requests() -> list[str]:
    (block,) = [b for b in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) if "curl" in b]
    address, *_ = block.splitlines()
    assert address == f"U={ADDRESS}/invocations"
    return [line for line in block.replace("\\\n", " ").splitlines() if line.startswith("curl")]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("line", requests(), ids=lambda line: re.sub(r"\s+", " ", line)[:90])
def test_a_request_of_the_readme_is_answered(line: str, address: str, tmp_path: Path) -> None:
    script = f"U={address}/invocations; {line} --fail-with-body"
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        timeout=120,
        env={**os.environ, "no_proxy": "127.0.0.1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout[:500]
    files = list(tmp_path.iterdir())
    if files:
        with Image.open(files[0]) as picture:
            assert picture.size == (64, 64)
        return
    reply = json.loads(done.stdout)
    assert "generated_image" in reply or "generated_images" in reply
    assert "a" in reply["prompt"].split()
