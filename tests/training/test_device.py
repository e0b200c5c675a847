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


T4 = "GPU-1{}, [N/A], Tesla T4, 15360, {}, 7.5"


def test_the_driver_names_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_driver(tmp_path, f"echo '{T4.format(0, 15109)}'", monkeypatch)
    (facts,) = device.visible_gpus({})
    assert facts == device.DeviceFacts(
        kind="cuda",
        name="Tesla T4",
        compute_capability=(7, 5),
        memory_bytes=15 * 2**30,
        free_bytes=15109 * 2**20 - device.CONTEXT_BYTES,
    )
    assert facts.mixed_precision == "fp16"
    assert device.in_common([facts]) == facts


@pytest.mark.parametrize(
    ("chosen", "free"),
    [
        (None, [1000, 2000, 3000]),
        ("", []),
        ("-1", []),
        ("2,0", [3000, 1000]),
        ("1,7,0", [2000]),  # what follows an entry that is no GPU does not count
        ("GPU-12, GPU-10", [3000, 1000]),
        ("GPU-1", []),
        ("MIG-abc", [1000]),
    ],
)
def test_the_visible_gpus_are_those_that_cuda_would_use(
    chosen: str | None, free: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [T4.format(number, 1000 * (number + 1)) for number in range(3)]
    with_driver(tmp_path, "\n".join(f"echo '{row}'" for row in rows), monkeypatch)
    environ = {} if chosen is None else {"CUDA_VISIBLE_DEVICES": chosen}
    found = [facts.free_bytes for facts in device.visible_gpus(environ)]
    assert found == [mebibytes * 2**20 - device.CONTEXT_BYTES for mebibytes in free]


def test_of_gpus_in_mig_mode_a_process_sees_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ["GPU-1, Enabled, H100, 81559, 80000, 9.0", "GPU-2, Enabled, H100, 81559, 80000, 9.0"]
    with_driver(tmp_path, "\n".join(f"echo '{row}'" for row in rows), monkeypatch)
    assert len(device.visible_gpus({})) == 1


def test_several_devices_have_the_facts_of_the_least() -> None:
    large = device.DeviceFacts(
        kind="cuda", name="A10G", compute_capability=(8, 6), memory_bytes=24, free_bytes=5
    )
    small = device.DeviceFacts(
        kind="cuda", name="Tesla T4", compute_capability=(7, 5), memory_bytes=16, free_bytes=15
    )
    assert device.in_common([large, small]) == device.DeviceFacts(
        kind="cuda",
        name="A10G, Tesla T4",
        compute_capability=(7, 5),
        memory_bytes=16,
        free_bytes=5,
    )
    assert device.in_common([large, device.CPU]) == device.in_common([]) == device.CPU


@pytest.mark.parametrize("script", ["exit 9", "echo 'No devices were found'", "echo"])
def test_a_driver_without_a_gpu_is_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    with_driver(tmp_path, script, monkeypatch)
    assert device.visible_gpus({}) == ()


def test_without_a_driver_it_is_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert device.visible_gpus({}) == ()


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
