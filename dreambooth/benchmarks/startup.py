"""How long a user waits before anything happens: processes are started and their output is timed.

Four moments: the table of hyperparameters is printed; a job's plan is printed; its first step is
made; the server's /ping says 200. Of each the median and the best of several starts, on the
embedded model.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

from dreambooth import tiny

_GIVE_UP_S = 300.0
_LISTENING = re.compile(r"listening on (http://\S+)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How often each is started."""
    parser.add_argument("--starts", type=int, default=3, help="of each; default: 3")


def main(arguments: argparse.Namespace) -> int:
    """Start, print the table and the JSON line."""
    moments: dict[str, Callable[[], float]] = {
        "hyperparameters printed": _table_printed,
        "plan printed": lambda: _training_says("expected memory"),
        "first step made": lambda: _training_says("training: 1/1"),
        "server ready": _server_ready,
    }
    medians, best = {}, {}
    print(f"{'moment':<28}seconds after the start")
    for name, measure in moments.items():
        seconds = [measure() for _ in range(arguments.starts)]
        medians[name], best[name] = round(statistics.median(seconds), 2), round(min(seconds), 2)
        print(f"{name:<28}{medians[name]:.2f}   ({best[name]:.2f} to {max(seconds):.2f})")
    machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    summary = {"benchmark": "startup", "machine": machine, "starts": arguments.starts}
    print(json.dumps({**summary, "seconds": medians, "best": best}))
    return 0


def _start(arguments: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "dreambooth", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _table_printed() -> float:
    began = time.monotonic()
    with _start(["hyperparameters"]) as process:
        process.communicate(timeout=_GIVE_UP_S)
    return time.monotonic() - began


def _training_says(sign: str) -> float:
    """Seconds until a one-step job has printed a line that begins with, or holds, `sign`."""
    with tempfile.TemporaryDirectory(prefix="startup-") as folder:
        options = {"train": tiny.DATA / "cat", "model_dir": Path(folder) / "model"}
        given = [f"--{name}={value}" for name, value in options.items()]
        began = time.monotonic()
        with _start(["train", "--pretrained_model=tiny", "--max_steps=1", *given]) as process:
            assert process.stdout is not None
            told = next((time.monotonic() for line in process.stdout if sign in line), None)
            process.communicate(timeout=_GIVE_UP_S)
    if told is None:
        raise RuntimeError(f"the job ended without a line that holds {sign!r}")
    return told - began


def _server_ready() -> float:
    began = time.monotonic()
    with _start(["serve", "--model", "tiny", "--host", "127.0.0.1", "--port", "0"]) as process:
        try:
            assert process.stdout is not None
            found = (_LISTENING.search(line) for line in process.stdout)
            address = next(match[1] for match in found if match)
            while not _answers(f"{address}/ping"):
                if time.monotonic() - began > _GIVE_UP_S:
                    raise RuntimeError(f"{address}/ping never said 200")
                time.sleep(0.02)
            return time.monotonic() - began
        finally:
            process.terminate()
            process.communicate(timeout=_GIVE_UP_S)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False
