"""The image as docker runs it: verbs, users, signals, no network, a read-only root.

test_channels.py tests input through unusual channels.
"""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from dreambooth.tiny import WEIGHTS

ROOT = Path(__file__).parents[2]

# Ends a process that looks up a name or opens a connection.
GUARD = """
import sys
def refuse(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.connect"):
        raise SystemExit(f"{event} {arguments}")
sys.addaudithook(refuse)
print("the guard stands", file=sys.stderr)
"""
TINY = {"pretrained_model": "tiny", "learning_rate": "1e-4"}
RESTRICTED = ("--user=12345:12345", "--read-only", "--tmpfs=/tmp", "--shm-size=64m")
Docker = Callable[..., subprocess.CompletedProcess[str]]
Tree = Callable[..., Path]
Start = Callable[..., str]
Holds = Callable[[Path], bool]


def test_without_an_argument_it_trains(
    docker: Docker, image: str, tree: Tree, model_in: Holds
) -> None:
    root = tree(**TINY, max_steps=3)
    done = docker("run", "--rm", "--network=none", f"--volume={root}:/opt/ml", image)
    assert model_in(root)
    for name in ("metrics.jsonl", "report.html"):
        assert (root / "output/data" / name).is_file()
    assert not (root / "output/failure").exists()
    assert "train_avg_loss=" in done.stdout
    assert "train_avg_loss=" not in done.stderr


def test_its_start_is_measured_from_outside(image: str) -> None:
    command = [sys.executable, "-m", "benchmarks", "startup", "--starts=1", f"--image={image}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["image"] == image
    assert 0 < summary["seconds"]["plan printed"] < summary["seconds"]["first step made"]
    assert summary["seconds"]["server ready"] > 0


def test_any_user_on_a_read_only_root_trains(train: Docker, tree: Tree, model_in: Holds) -> None:
    root = tree(**TINY, max_steps=2)
    train(root, *RESTRICTED)
    assert model_in(root)


def test_a_failing_job_says_why_and_leaves_no_model(train: Docker, tree: Tree) -> None:
    root = tree(**TINY, max_steps=2, learning_rat="3")
    (root / "input/data/training/dataset_info.json").unlink()
    done = train(root, check=False)
    assert done.returncode == 1
    assert "dataset_info.json" in (root / "output/failure").read_text()
    assert not list((root / "model").iterdir())


def test_a_hub_id_without_a_network_is_reported_at_once(train: Docker, tree: Tree) -> None:
    root = tree(pretrained_model="somebody/some-model", max_steps=2)
    began = time.monotonic()
    done = train(root, check=False)
    assert done.returncode == 1
    assert "somebody/some-model" in (root / "output/failure").read_text()
    assert time.monotonic() - began < 40  # only guards against waiting for time-outs


def test_a_job_asks_nobody_on_the_network(
    train: Docker, tree: Tree, model_in: Holds, tmp_path: Path
) -> None:
    root = tree(**TINY, max_steps=2, compute_fid="True")
    guard = tmp_path / "guard"
    guard.mkdir()
    (guard / "sitecustomize.py").write_text(GUARD)
    options = (f"--volume={guard}:/guard:ro", "--env=PYTHONPATH=/guard:/opt/dreambooth")
    done = train(root, *options)
    assert "the guard stands" in done.stderr
    assert model_in(root)


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--env=SM_NUM_GPUS=1", "SM_NUM_GPUS=1 promises a GPU"),
        ("--device=/dev/null:/dev/nvidia0", "this machine shows 1 NVIDIA GPU"),  # as with --gpus
    ],
)
def test_a_promised_gpu_that_cannot_be_used_is_reported(
    option: str, told: str, train: Docker, tree: Tree
) -> None:
    root = tree(**TINY, max_steps=2)
    done = train(root, option, check=False)
    assert done.returncode == 1
    assert told in (root / "output/failure").read_text()


def test_any_verb_of_the_program_works(docker: Docker, image: str) -> None:
    table = json.loads(docker("run", "--rm", image, "hyperparameters", "--format", "json").stdout)
    assert "max_steps" in json.dumps(table)


def test_what_sagemaker_starts_by_itself_is_inside(docker: Docker, image: str) -> None:
    script = "bash --version && python3 --version && python3 -m pip --version"
    docker("run", "--rm", "--entrypoint=/bin/bash", image, "-c", script)
    shown = json.loads(docker("inspect", image).stdout)[0]["Config"]
    assert shown["Labels"]["com.amazonaws.sagemaker.capabilities.accept-bind-to-port"] == "true"
    assert isinstance(shown["Entrypoint"], list)
    assert shown["Cmd"] == ["train"]


def test_neither_tests_nor_history_are_inside(docker: Docker, image: str) -> None:
    listed = docker("run", "--rm", "--entrypoint=ls", image, "-A", "/opt/dreambooth").stdout.split()
    assert "dreambooth" in listed
    assert not {".git", "tests", ".ci", ".venv", "out"} & set(listed)


def test_the_build_argument_takes_torch_from_another_index_first(
    docker: Docker, image: str, tmp_path: Path
) -> None:
    """The project's Dockerfile is built on a base image whose pip only notes its arguments."""
    base, built = f"{image}-noting-pip", f"{image}-other-torch"
    noting = "FROM {}\nRUN printf '#!/bin/sh\\necho \"$@\" >>/asked\\n' >/usr/local/bin/pip"
    (tmp_path / "Dockerfile").write_text(noting.format(image) + " && chmod +x /usr/local/bin/pip\n")
    try:
        docker("build", "-t", base, str(tmp_path))
        arguments = (f"BASE_IMAGE={base}", "TORCH_INDEX=https://index.invalid/cu126")
        given = [f"--build-arg={argument}" for argument in arguments]
        docker("build", *given, "-t", built, str(ROOT))
        asked = docker("run", "--rm", "--entrypoint=cat", built, "/asked").stdout.splitlines()
    finally:
        docker("rmi", "--force", built, base, check=False)
    torch, everything, vocabulary = asked
    pin = next(
        line.split()[0]
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line.startswith("torch==")
    )
    assert torch.endswith(f"--index-url https://index.invalid/cu126 {pin}")
    assert everything.endswith("-r requirements.txt")
    assert vocabulary.endswith("--no-deps -r requirements/clip-vocabulary.txt")


def test_docker_stop_during_training_ends_it_in_time(
    docker: Docker, image: str, tree: Tree, container: Start
) -> None:
    root = tree(**TINY, max_steps=100000)
    name = container("--network=none", f"--volume={root}:/opt/ml", image, "train")
    wait_for(lambda: (root / "output/data/metrics.jsonl").exists(), 120)
    began = time.monotonic()
    docker("stop", "--time=120", name)
    assert time.monotonic() - began < 10
    state = json.loads(docker("inspect", name).stdout)[0]["State"]
    assert state["ExitCode"] == 143


@pytest.mark.parametrize("options", [(), RESTRICTED], ids=["as root", "restricted"])
def test_serve_answers_and_docker_stop_drains(
    options: tuple[str, ...], docker: Docker, image: str, container: Start, free_port: int
) -> None:
    name = container(
        f"--publish=127.0.0.1:{free_port}:8080",
        f"--volume={WEIGHTS}:/opt/ml/model:ro",
        *options,
        image,
        "serve",
    )
    url = f"http://127.0.0.1:{free_port}"
    began = time.monotonic()
    wait_for(lambda: answers(url), 60)
    assert time.monotonic() - began < 20
    assert draw(url, num_inference_steps=4) == [(64, 64)]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(draw, url, num_inference_steps=80, num_images_per_prompt=2)
        wait_for(lambda: waiting.done() or working(url), 60)
        assert not waiting.done()
        docker("stop", "--time=30", name)
        assert waiting.result() == [(64, 64)] * 2
    state = json.loads(docker("inspect", name).stdout)[0]["State"]
    assert state["ExitCode"] == 0, docker("logs", name).stderr


def working(url: str) -> bool:
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as reply:
        return "dreambooth_requests_in_flight 1.0" in reply.read().decode()


def draw(url: str, **keys: int) -> list[tuple[int, int]]:
    """Return the sizes of the pictures in the server's reply."""
    request = urllib.request.Request(
        f"{url}/invocations",
        json.dumps({"prompt": "a photo of a cat", "seed": 1, **keys}).encode(),
        {"Content-Type": "application/json", "Accept": "application/json;jpeg"},
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        pictures = json.load(reply)["generated_images"]
    return [Image.open(io.BytesIO(base64.b64decode(picture))).size for picture in pictures]


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ping", timeout=2) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def wait_for(ready: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.1)
