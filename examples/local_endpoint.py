"""Serves a model on this machine, for the notebooks beside this file.

The server runs in a container where docker has the image of `make image`, else as a process.
Standard library only.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMAGE = os.environ.get("DREAMBOOTH_IMAGE", "dreambooth")
LOG = ROOT / "out" / "local_endpoint.log"
READY_WITHIN_S = 180


class LocalEndpoint:
    """A server on this machine, called in the same way as SageMaker's Predictor."""

    def __init__(self, process: subprocess.Popen[bytes], address: str, place: str) -> None:
        self._process, self.address, self.place = process, address, place
        # Not through a proxy.
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def __repr__(self) -> str:
        return f"Our server, in a {self.place}, at {self.address}"

    def predict(self, data: bytes, initial_args: Mapping[str, str]) -> bytes:
        """Return the reply to one request; initial_args holds its ContentType and Accept.

        Raises RuntimeError with the status and the server's sentence where it refuses.
        """
        headers = {"Content-Type": initial_args["ContentType"], "Accept": initial_args["Accept"]}
        request = urllib.request.Request(f"{self.address}/invocations", data, headers)
        try:
            with self._open(request) as reply:
                body: bytes = reply.read()
                return body
        except urllib.error.HTTPError as error:
            with error:
                message = json.loads(error.read())["message"]
            raise RuntimeError(f"{error.code}: {message}") from None

    def wait_until_ready(self) -> None:
        """Wait until the server has drawn its first picture, as a test."""
        end = time.monotonic() + READY_WITHIN_S
        while self._process.poll() is None and time.monotonic() < end:
            try:
                with self._open(f"{self.address}/ping", timeout=5):
                    return
            except OSError:  # it is loading: no connection yet, or a 503
                time.sleep(0.5)
        self.delete_endpoint()
        raise RuntimeError(f"The server did not start:\n{LOG.read_text()[-2000:]}")

    def delete_endpoint(self) -> None:
        """Stop the server. It finishes what it is drawing."""
        self._process.terminate()
        self._process.wait(60)
        atexit.unregister(self.delete_endpoint)


def deploy(model: str | Path) -> LocalEndpoint:
    """Start a server of a model folder and return it when it is ready.

    Its port is that of the variable DREAMBOOTH_PORT, else a free one.
    """
    folder = Path(model).resolve()
    port = int(os.environ.get("DREAMBOOTH_PORT", "0")) or _free_port()
    if _docker_has_the_image():
        place = "container"
        command = ["docker", "run", "--rm", f"--name=dreambooth-{port}"]
        command += [f"--publish=127.0.0.1:{port}:8080", f"--volume={folder}:/opt/ml/model:ro"]
        command += [IMAGE, "serve"]
    else:
        place = "process"
        command = [str(ROOT / ".venv/bin/python"), "-m", "dreambooth", "serve"]
        command += [f"--model={folder}", "--host=127.0.0.1", f"--port={port}"]
    LOG.parent.mkdir(exist_ok=True)
    with LOG.open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    endpoint = LocalEndpoint(process, f"http://127.0.0.1:{port}", place)
    atexit.register(endpoint.delete_endpoint)  # should the notebook be closed before its end
    endpoint.wait_until_ready()
    return endpoint


def _docker_has_the_image() -> bool:
    if shutil.which("docker") is None:
        return False
    command = ["docker", "image", "inspect", IMAGE]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
