"""Measure how long a user waits before anything happens: start processes and time their output.

Four moments are timed on the embedded model: the table of hyperparameters is printed, a job's
training plan is printed, its first step is made, and the server's /ping answers 200. Each is given
as the median and the best of several starts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import dreambooth
from dreambooth import tiny

_GIVE_UP_S = 300.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options: what is started, and how often."""
    parser.add_argument("--starts", type=int, default=3, help="of each; default: 3")
    parser.add_argument("--image", help="an image, started by docker; default: this checkout")


def main(arguments: argparse.Namespace) -> int:
    """Start everything, print the table and the JSON line."""
    product = Product(arguments.image)
    moments: dict[str, Callable[[], float]] = {
        "hyperparameters printed": product.table_printed,
        "plan printed": lambda: product.training_says("expected memory"),
        "first step made": lambda: product.training_says("training: 1/1"),
        "server ready": product.server_ready,
    }
    medians, best = {}, {}
    print(f"{'moment':<28}seconds after the start")
    for name, measure in moments.items():
        seconds = [measure() for _ in range(arguments.starts)]
        medians[name], best[name] = round(statistics.median(seconds), 2), round(min(seconds), 2)
        print(f"{name:<28}{medians[name]:.2f}   ({best[name]:.2f} to {max(seconds):.2f})")
    machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    summary = {"benchmark": "startup", "machine": machine, "starts": arguments.starts}
    if arguments.image:
        summary["image"] = arguments.image
    print(json.dumps({**summary, "seconds": medians, "best": best}))
    return 0


class Product:
    """The program of this checkout, or of an image, as a user starts it."""

    def __init__(self, image: str | None) -> None:
        self._image = image
        inside = Path("/opt/dreambooth") / tiny.DATA.relative_to(
            Path(dreambooth.__file__).parents[1]
        )
        self._data = (tiny.DATA if image is None else inside) / "cat"

    def start(self, *arguments: str, publish: int | None = None) -> subprocess.Popen[str]:
        """Start a verb; publish: the port of this machine that leads to a container's port 8080."""
        command = [sys.executable, "-m", "dreambooth"]
        if self._image is not None:
            ports = [f"--publish=127.0.0.1:{publish}:8080"] if publish else []
            docker = os.environ.get("DOCKER", "docker")
            command = [docker, "run", "--rm", *ports, self._image]
        return subprocess.Popen(
            [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def table_printed(self) -> float:
        """Return the seconds until the process that prints the hyperparameters has ended."""
        began = time.monotonic()
        with self.start("hyperparameters") as process:
            process.communicate(timeout=_GIVE_UP_S)
        if process.returncode != 0:
            raise RuntimeError(f"`hyperparameters` ended with {process.returncode}")
        return time.monotonic() - began

    def training_says(self, sign: str) -> float:
        """Return the seconds until a one-step job has printed a line that contains `sign`."""
        with tempfile.TemporaryDirectory(prefix="startup-") as folder:
            model_dir = Path(folder) / "model" if self._image is None else "/tmp/model"
            options = ("--pretrained_model=tiny", "--max_steps=1")
            given = (f"--train={self._data}", f"--model_dir={model_dir}")
            began = time.monotonic()
            with self.start("train", *options, *given) as process:
                assert process.stdout is not None
                ready = next((time.monotonic() for line in process.stdout if sign in line), None)
                process.communicate(timeout=_GIVE_UP_S)
        if ready is None:
            raise RuntimeError(f"the job ended without a line that holds {sign!r}")
        return ready - began

    def server_ready(self) -> float:
        """Return the seconds until the server's /ping answers 200."""
        port = _free_port()
        own = ("--host=127.0.0.1", f"--port={port}") if self._image is None else ()
        began = time.monotonic()
        with self.start("serve", "--model=tiny", *own, publish=port) as process:
            try:
                while not _answers(f"http://127.0.0.1:{port}/ping"):
                    if process.poll() is not None or time.monotonic() - began > _GIVE_UP_S:
                        raise RuntimeError("the server's /ping never said 200")
                    time.sleep(0.02)
                return time.monotonic() - began
            finally:
                process.terminate()
                process.communicate(timeout=_GIVE_UP_S)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False
