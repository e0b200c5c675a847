"""Ten of the hostile inputs in a real process, which exits with 1 and writes a failure file."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def _prompts(data: bytes) -> Callable[[Any], str]:
    def make(sandbox: Any) -> str:
        (sandbox.photos / "dataset_info.json").write_bytes(data)
        return "dataset_info.json"

    return make


def _picture(data: bytes) -> Callable[[Any], str]:
    def make(sandbox: Any) -> str:
        (sandbox.photos / "good.png").write_bytes(data)
        return "good.png"

    return make


def _archive(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> Callable[[Any], str]:
    def make(sandbox: Any) -> str:
        sandbox.model = sandbox.root / "hostile.tar.gz"
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        with tarfile.open(sandbox.model, "w:gz") as tar:
            tar.addfile(info, io.BytesIO())
        return "hostile.tar.gz"

    return make


def _fifo(sandbox: Any) -> str:
    (sandbox.photos / "good.png").unlink()
    os.mkfifo(sandbox.photos / "good.png")
    return "good.png"


def _foreign_class(sandbox: Any) -> str:
    sandbox.model = sandbox.root / "base"
    sandbox.model.mkdir()
    (sandbox.model / "model_index.json").write_text('{"_class_name": "EvilPipeline"}')
    return "model_index.json"


CASES: dict[str, Callable[[Any], str]] = {
    "no json": _prompts(b"{'instance_prompt': "),
    "not utf-8": _prompts(b'{"instance_prompt": "caf\xe9"}'),
    "deeply nested": _prompts(b"[" * 100_000),
    "an empty picture": _picture(b""),
    "a cut picture": _picture(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"),
    "a fifo": _fifo,
    "an absolute path": _archive("/tmp/escaped"),
    "a path that leads out": _archive("../../victim/precious"),
    "a link": _archive("x", tarfile.SYMTYPE, "../../victim/precious"),
    "a foreign class": _foreign_class,
}


@pytest.mark.parametrize("name", CASES)
def test_a_real_job_ends_with_1_and_says_why(sandbox: Any, name: str) -> None:
    told = CASES[name](sandbox)
    (sandbox.root / "out" / "output").mkdir(parents=True)
    before = sandbox.seen()
    done = subprocess.run(
        [sys.executable, "transfer_learning.py", *sandbox.argv()],
        cwd=ROOT,
        env={
            **os.environ,
            "SAGEMAKER_BASE_DIR": str(sandbox.root / "out"),
            "TMPDIR": str(sandbox.root / "tmp"),
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    failure = (sandbox.root / "out" / "output" / "failure").read_text()
    sandbox.check(done.stderr, failure, told, before)
