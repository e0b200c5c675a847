"""Runs the documents' shell blocks as printed: training, drawing, serving and sending requests.

Their folders are those of the embedded model, and their steps are few. The blocks for docker and
for SageMaker's SDKs are run by tests/container.
"""

from __future__ import annotations

import json
import os
import re
import shlex
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

from dreambooth.tiny import DATA, WEIGHTS
from tests.documents import ROOT, blocks, shell_block

ADDRESS = "http://127.0.0.1:8080"


def workshop(folder: Path) -> Path:
    """Return a folder in which the documents' paths lead to small data and models."""
    for name in ("dreambooth", "transfer_learning.py"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "models").mkdir()
    (folder / "models/stable-diffusion-2-1-base").symlink_to(WEIGHTS)
    shutil.copytree(DATA / "cat", folder / "photos")
    return folder


def environ() -> dict[str, str]:
    # `python` must be this interpreter.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "no_proxy": "127.0.0.1"}


def test_the_block_for_ones_own_pictures_plans_trains_and_draws(tmp_path: Path) -> None:
    block = shell_block("python transfer_learning.py --pretrained-model models/")
    assert block.count("--max_steps 400") == 2
    assert block.count("--count 4") == 1
    script = "set -e\n" + block.replace("--max_steps 400", "--max_steps 4")
    script = script.replace("--count 4", "--count 4 --num_inference_steps 4")
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=workshop(tmp_path),
        env=environ(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("4 (0.5 epochs of 8 instance images)") == 2, done.stdout
    assert (tmp_path / "out/mine/model_index.json").is_file()
    drawn = [path for path in (tmp_path / "out").rglob("*.png") if "mine" not in path.parts]
    assert len(drawn) >= 4


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield the address of the server that the README starts, on a free port.

    out/mine is the embedded model.
    """
    folder = workshop(tmp_path_factory.mktemp("server"))
    (folder / "out").mkdir()
    (folder / "out/mine").symlink_to(WEIGHTS)
    log = folder / "server.log"
    line = shell_block("python -m dreambooth serve").split("#")[0].strip()
    with log.open("wb") as stream:
        server = subprocess.Popen(
            [*shlex.split(line), "--host", "127.0.0.1", "--port", "0"],
            cwd=folder,
            env=environ(),
            stderr=stream,
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
    found = [block for block in blocks("sh") if re.search("^curl", block, re.MULTILINE)]
    assert len(found) == 2
    lines = "".join(found).replace("\\\n", " ").splitlines()
    assert f"U={ADDRESS}/invocations" in lines
    return [line for line in lines if line.startswith("curl")]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("line", requests(), ids=lambda line: re.sub(r"\s+", " ", line)[:90])
def test_a_request_is_answered(line: str, address: str, tmp_path: Path) -> None:
    assert len(re.findall(rf"\$U |{ADDRESS}/invocations ", line)) == 1
    script = f"U={address}/invocations; {line.replace(ADDRESS, address)} --fail-with-body"
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        timeout=120,
        env=environ(),
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
