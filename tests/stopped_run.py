"""Runs a training process on a slow disk, stops it with SIGTERM and checks what it wrote.

Used by `tests/job/test_stopping.py` (the embedded model) and `test_real_size.py` (full size).
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LONG_S = 3_000.0  # only guards against a hang


@dataclass(frozen=True, slots=True, kw_only=True)
class StoppedRun:
    """The outcome of a stopped run.

    code: the exit code. seconds: from SIGTERM to the exit. flushed: the bytes that fsync made
    durable.
    """

    code: int
    seconds: float
    flushed: int
    steps: int
    log: str


def stop_in_training(
    arguments: Sequence[object],
    place: Path,
    *,
    metrics: Path,
    bytes_per_second: float,
    stop_seconds: float | None = None,
) -> StoppedRun:
    """Run `transfer_learning.py`, send SIGTERM after two rows of `metrics`, and wait for its end.

    place: a folder for the logs. stop_seconds: see tests/slow_disk/sitecustomize.py.
    """
    flushed, said = place / "flushed.txt", place / "stderr.txt"
    environ = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ROOT / "tests" / "slow_disk"), str(ROOT))),
        "SLOW_DISK_BYTES_PER_SECOND": str(bytes_per_second),
        "SLOW_DISK_LOG": str(flushed),
    }
    if stop_seconds is not None:
        environ["SLOW_DISK_STOP_SECONDS"] = str(stop_seconds)
    command = [sys.executable, "transfer_learning.py", *map(str, arguments)]
    with said.open("w") as stderr:
        process = subprocess.Popen(command, cwd=ROOT, env=environ, stderr=stderr)
    try:
        end = time.monotonic() + LONG_S
        while not metrics.exists() or metrics.read_text("utf-8").count("\n") < 2:
            assert process.poll() is None, said.read_text("utf-8")
            assert time.monotonic() < end
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        sent = time.monotonic()
        code = process.wait(LONG_S)
        seconds = time.monotonic() - sent
    finally:
        process.kill()
        process.wait()
    lines = flushed.read_text("utf-8").splitlines() if flushed.exists() else []
    return StoppedRun(
        code=code,
        seconds=round(seconds, 1),
        flushed=sum(int(line.split(" ", 1)[0]) for line in lines),
        steps=metrics.read_text("utf-8").count("\n"),
        log=said.read_text("utf-8"),
    )


def checked_checkpoint(folder: Path) -> int:
    """Check the only checkpoint of a folder and its digests; return its size in bytes.

    Raises AssertionError, also where the folder holds anything else.
    """
    (checkpoint,) = folder.iterdir()
    assert checkpoint.name.startswith("step-")
    files = json.loads((checkpoint / "manifest.json").read_text("utf-8"))["files"]
    assert {"optimizer.pt", "unet.safetensors"} <= files.keys()
    for name, digest in files.items():
        with (checkpoint / name).open("rb") as file:
            assert hashlib.file_digest(file, "sha256").hexdigest() == digest, name
    return size(checkpoint)


def size(folder: Path) -> int:
    """Return the size of all files in a folder, in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
