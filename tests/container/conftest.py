"""Fixtures for the tests of the image, which run where DREAMBOOTH_IMAGE names a built image."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dreambooth.tiny import DATA

Docker = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def image() -> str:
    name = os.environ.get("DREAMBOOTH_IMAGE")
    if not name:
        pytest.skip("DREAMBOOTH_IMAGE names no image: see `make test-container`")
    return name


@pytest.fixture(scope="session")
def docker(image: str) -> Docker:
    """Return a function that runs the docker client named by DOCKER (default: docker).

    It fails the test when the client fails, unless check=False.
    """
    client = os.environ.get("DOCKER", "docker")

    def run(
        *arguments: str, check: bool = True, timeout: float = 240
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [client, *arguments], capture_output=True, text=True, timeout=timeout, check=False
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    return run


@pytest.fixture
def container(docker: Docker) -> Iterator[Callable[..., str]]:
    """Yield a function that starts a detached container and returns its name.

    All are removed at the end.
    """
    started: list[str] = []

    def start(*arguments: str) -> str:
        name = f"dreambooth-test-{uuid.uuid4().hex[:12]}"
        started.append(name)
        docker("run", "--detach", "--name", name, *arguments)
        return name

    yield start
    for name in started:
        docker("rm", "--force", name, check=False)


@pytest.fixture
def no_leftovers(docker: Docker) -> Iterator[None]:
    """Remove what the SDKs leave, stopped containers and a network; fail if one still runs."""
    yield
    network = "sagemaker-local"
    assert not docker("ps", "--quiet", f"--filter=network={network}").stdout
    for name in docker("ps", "--all", "--quiet", f"--filter=network={network}").stdout.split():
        docker("rm", name)
    if docker("network", "ls", "--quiet", f"--filter=name={network}").stdout:
        docker("network", "rm", network)


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Yield a function that makes an /opt/ml tree.

    It holds the cat's eight pictures and the given hyperparameters.
    """
    made: list[Path] = []

    def make(**hyperparameters: object) -> Path:
        root = tmp_path / f"ml{len(made)}"
        made.append(root)
        for folder in ("input/config", "input/data", "model", "output/data"):
            (root / folder).mkdir(parents=True)
        shutil.copytree(DATA / "cat", root / "input/data/training")
        settings = {name: str(value) for name, value in hyperparameters.items()}
        (root / "input/config/hyperparameters.json").write_text(json.dumps(settings))
        for path in (root, *root.rglob("*")):
            path.chmod(0o777 if path.is_dir() else 0o666)  # the image may run as any user
        return root

    yield make
    for root in made:  # containers write as root
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def train(docker: Docker, image: str) -> Docker:
    """Return a function that runs a job on a tree without a network.

    It is called as `train(root, *options of docker run)`.
    """

    def run(root: Path, *options: str, **more: bool) -> subprocess.CompletedProcess[str]:
        mount = f"--volume={root}:/opt/ml"
        return docker("run", "--rm", "--network=none", mount, *options, image, "train", **more)

    return run


@pytest.fixture
def model_in() -> Callable[[Path], bool]:
    """Return a function that checks whether a tree contains a complete model."""
    parts = {"model_index.json", "unet", "vae", "text_encoder", "tokenizer", "scheduler"}
    return lambda root: parts <= {path.name for path in (root / "model").iterdir()}


@pytest.fixture
def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
