"""The notebooks' local endpoint in a container; tests/examples runs it as a process."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from dreambooth.tiny import WEIGHTS
from examples import local_endpoint
from tests.container.conftest import Docker


def test_it_runs_in_a_container_where_docker_has_the_image(
    image: str, docker: Docker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = shutil.which(os.environ.get("DOCKER", "docker"))
    assert client is not None
    (tmp_path / "docker").symlink_to(client)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(local_endpoint, "IMAGE", image)
    monkeypatch.setattr(local_endpoint, "LOG", tmp_path / "log")
    endpoint = local_endpoint.deploy(WEIGHTS)
    try:
        assert endpoint.place == "container"
        reply = endpoint.predict(
            b"a photo of a cat", {"ContentType": "application/x-text", "Accept": "application/json"}
        )
        assert len(json.loads(reply)["generated_image"]) == 64
        with pytest.raises(RuntimeError, match=r"^400: "):
            endpoint.predict(b"{}", {"ContentType": "application/json", "Accept": "image/png"})
    finally:
        endpoint.delete_endpoint()
    port = endpoint.address.rpartition(":")[2]
    assert not docker("ps", "--all", "--quiet", f"--filter=name=dreambooth-{port}").stdout
