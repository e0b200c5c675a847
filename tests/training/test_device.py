from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from dreambooth.training import device


def with_driver(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a stand-in for nvidia-smi first on the PATH."""
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_the_driver_names_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_driver(tmp_path, "echo 'Tesla T4, 15360, 15109, 7.5'", monkeypatch)
    facts = device.from_driver()
    assert facts == device.DeviceFacts(
        kind="cuda",
        name="Tesla T4",
        compute_capability=(7, 5),
        memory_bytes=15 * 2**30,
        free_bytes=15109 * 2**20 - device.CONTEXT_BYTES,
    )
    assert facts.mixed_precision == "fp16"


@pytest.mark.parametrize("script", ["exit 9", "echo 'No devices were found'", "echo"])
def test_a_driver_without_a_gpu_is_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    with_driver(tmp_path, script, monkeypatch)
    assert device.from_driver() == device.CPU


def test_without_a_driver_it_is_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert device.from_driver() == device.CPU


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo '41, 300'; echo '42, 1000'; echo '42, 24'", 2**30),  # on two GPUs
        ("echo '41, 300'", None),
        ("echo '42, [N/A]'", None),
        ("exit 9", None),
        ("true", None),
    ],
)
def test_the_driver_counts_a_processs_memory(
    script: str, expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 'test "$1" = --query-compute-apps=pid,used_memory || exit 1\n'
    with_driver(tmp_path, asked + script, monkeypatch)
    assert device.process_memory_bytes(42) == expected


def test_precision_by_compute_capability() -> None:
    def of(capability: tuple[int, int]) -> str:
        return device.DeviceFacts(
            kind="cuda", name="", compute_capability=capability, memory_bytes=1
        ).mixed_precision

    assert [of(c) for c in ((7, 0), (7, 5), (8, 0), (9, 0))] == ["fp16", "fp16", "bf16", "bf16"]
    assert device.CPU.mixed_precision == "no"


def test_torch_and_this_machine_agree() -> None:
    assert (device.from_torch(torch).kind == "cuda") == torch.cuda.is_available()
    assert device.host_memory_bytes() > 2**30
