"""The image as docker runs it: verbs, users, signals, a closed network, a read-only root."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from dreambooth.tiny import WEIGHTS

TINY = {"pretrained_model": "tiny", "learning_rate": "1e-4"}
MODEL_PARTS = {"model_index.json", "unet", "vae", "text_encoder", "tokenizer", "scheduler"}
Docker = Callable[..., subprocess.CompletedProcess[str]]
Tree = Callable[..., Path]
Start = Callable[..., str]


def job(root: Path, *options: str) -> list[str]:
    return ["run", "--rm", "--network=none", f"--volume={root}:/opt/ml", *options]


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_without_an_argument_it_trains(docker: Docker, image: str, tree: Tree) -> None:
    root = tree(**TINY, max_steps=3)
    done = docker(*job(root), image)
    assert entries(root / "model") >= MODEL_PARTS
    assert {"metrics.jsonl", "report.html"} <= entries(root / "output/data")
    assert not (root / "output/failure").exists()
    assert "train_avg_loss=" in done.stderr + done.stdout


def test_any_user_on_a_read_only_root_trains(docker: Docker, image: str, tree: Tree) -> None:
    root = tree(**TINY, max_steps=2)
    options = ("--user=12345:12345", "--read-only", "--tmpfs=/tmp", "--shm-size=64m")
    docker(*job(root, *options), image, "train")
    assert entries(root / "model") >= MODEL_PARTS


def test_a_failing_job_says_why_and_leaves_no_model(docker: Docker, image: str, tree: Tree) -> None:
    root = tree(**TINY, max_steps=2, learning_rat="3")
    (root / "input/data/training/dataset_info.json").unlink()
    done = docker(*job(root), image, "train", check=False)
    assert done.returncode == 1
    assert "dataset_info.json" in (root / "output/failure").read_text()
    assert entries(root / "model") == set()


def test_a_hub_id_without_a_network_is_told_at_once(docker: Docker, image: str, tree: Tree) -> None:
    root = tree(pretrained_model="somebody/some-model", max_steps=2)
    began = time.monotonic()
    done = docker(*job(root), image, "train", check=False)
    assert done.returncode == 1
    assert "somebody/some-model" in (root / "output/failure").read_text()
    assert time.monotonic() - began < 40  # a guard against waiting for time-outs


def test_a_promised_gpu_that_is_not_there_is_told(docker: Docker, image: str, tree: Tree) -> None:
    root = tree(**TINY, max_steps=2)
    done = docker(*job(root, "--env=SM_NUM_GPUS=1"), image, "train", check=False)
    assert done.returncode == 1
    assert "SM_NUM_GPUS=1 promises a GPU" in (root / "output/failure").read_text()


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


def test_serve_answers_and_docker_stop_drains(
    docker: Docker, image: str, container: Start, free_port: int
) -> None:
    name = container(
        f"--publish=127.0.0.1:{free_port}:8080",
        f"--volume={WEIGHTS}:/opt/ml/model:ro",
        image,
        "serve",
    )
    url = f"http://127.0.0.1:{free_port}"
    began = time.monotonic()
    wait_for(lambda: answers(url), 60)
    assert time.monotonic() - began < 20
    request = urllib.request.Request(
        f"{url}/invocations",
        json.dumps({"prompt": "a photo of a cat", "num_inference_steps": 4, "seed": 1}).encode(),
        {"Content-Type": "application/json", "Accept": "application/json;jpeg"},
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        picture = json.load(reply)["generated_images"][0]
    assert Image.open(io.BytesIO(base64.b64decode(picture))).size == (64, 64)
    docker("stop", "--time=30", name)
    state = json.loads(docker("inspect", name).stdout)[0]["State"]
    assert state["ExitCode"] == 0, docker("logs", name).stderr


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


@pytest.mark.parametrize("name", ["other.tar.gz", "output.tar.gz"])
def test_a_stray_tarball_beside_the_model_is_not_taken_for_it(
    docker: Docker, image: str, tree: Tree, name: str
) -> None:
    root = tree(max_steps=2, learning_rate="1e-4")
    channel = root / "input/data/model"
    channel.mkdir()
    subprocess.run(["tar", "-czf", channel / "base.tar.gz", "-C", WEIGHTS, "."], check=True)
    subprocess.run(
        ["tar", "-czf", channel / name, "-C", root, "output", "input/config"], check=True
    )
    docker(*job(root, f"--volume={channel}:/opt/ml/input/data/model:ro"), image, "train")
    assert entries(root / "model") >= MODEL_PARTS


def test_a_read_only_channel_full_of_stray_files_trains(
    docker: Docker, image: str, tree: Tree
) -> None:
    root = tree(**TINY, max_steps=2)
    training = root / "input/data/training"
    for number in range(3000):
        (training / f"nötiz {number}.txt").write_text("no picture")
