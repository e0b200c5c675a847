from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dreambooth.__main__ import main
from dreambooth.errors import ResourceError, UserError
from dreambooth.job.run import run_job
from dreambooth.process import gpu_driver
from dreambooth.process.gpu_driver import (
    Machine,
    gpu_promise,
    has_kernels,
    inspect_machine,
    refuse_cpu,
    why_unused,
)
from dreambooth.serving.engine.engine import open_engine
from dreambooth.settings.serve_options import ServeSettings
from dreambooth.tiny import DATA, WEIGHTS

OLD = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\n"
OPEN = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (root)\n"
    "GCC version:  gcc version 12.2.0\n"
)
NONE = Machine(driver=None, gpus=0)


@pytest.mark.parametrize(("text", "version"), [(OLD, "535.183.01"), (OPEN, "580.65.06")])
def test_driver_version_is_read_from_the_kernel(text: str, version: str, tmp_path: Path) -> None:
    (tmp_path / "version").write_text(text)
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert inspect_machine(tmp_path / "version", tmp_path) == Machine(driver=version, gpus=2)


def test_a_machine_without_a_gpu_shows_none(tmp_path: Path) -> None:
    assert inspect_machine(tmp_path / "version", tmp_path) == NONE


def test_nothing_is_refused_where_nothing_was_promised() -> None:
    for told in ("", "0", "many"):
        refuse_cpu({"SM_NUM_GPUS": told}, NONE, torch_version="2.13.0", cuda_version="13.0")


@pytest.mark.parametrize("asked", ["", "-1"])
def test_the_cpu_can_be_asked_for_by_name(asked: str) -> None:
    environ = {"SM_NUM_GPUS": "1", "CUDA_VISIBLE_DEVICES": asked}
    assert gpu_promise(environ, Machine(driver="535.1", gpus=1)) is None


def test_where_no_gpu_was_promised_there_is_nothing_to_say() -> None:
    assert why_unused({}, NONE, torch_version="2.13.0", cuda_version="13.0") is None


def test_an_old_driver_is_named_beside_what_torch_needs() -> None:
    machine = Machine(driver="535.183.01", gpus=1)
    with pytest.raises(ResourceError) as raised:
        refuse_cpu({}, machine, torch_version="2.13.0+cu130", cuda_version="13.0")
    for part in ("1 NVIDIA GPU,", "535.183.01", "CUDA 13.0", "580", "TORCH_INDEX"):
        assert part in str(raised.value)


def test_a_promise_without_a_driver_asks_for_gpus_all() -> None:
    with pytest.raises(ResourceError, match=r"SM_NUM_GPUS=1 .*--gpus all"):
        refuse_cpu({"SM_NUM_GPUS": "1"}, NONE, torch_version="2.13.0", cuda_version="13.0")


def test_a_build_without_cuda_is_named() -> None:
    with pytest.raises(ResourceError, match="build without CUDA"):
        refuse_cpu({"SM_NUM_GPUS": "4"}, NONE, torch_version="2.13.0+cpu", cuda_version=None)


def test_a_job_on_an_old_driver_fails_with_both_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "version").write_text(OLD)
    (tmp_path / "nvidia0").touch()
    machine = inspect_machine(tmp_path / "version", tmp_path)
    monkeypatch.setattr(gpu_driver, "inspect_machine", lambda: machine)
    # torch's CUDA build reports this on such a machine.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    argv = ["--pretrained-model=tiny", f"--train={DATA / 'cat'}", f"--model_dir={tmp_path / 'm'}"]
    assert run_job([*argv, "--max_steps=1"], {"SAGEMAKER_BASE_DIR": str(tmp_path)}) == 1
    told = (tmp_path / "output" / "failure").read_text()
    assert "535.183.01" in told
    assert f"torch {torch.__version__} (CUDA 13.0)" in told
    assert "580" in told
    assert not (tmp_path / "m" / "model_index.json").exists()


CU130 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")


@pytest.mark.parametrize(
    ("capability", "built_for", "expected"),
    [
        ((7, 0), CU130, False),  # V100
        ((6, 0), CU130, False),
        *(((major, minor), CU130, True) for major, minor in ((7, 5), (8, 0), (8, 6), (8, 9))),
        *(((major, 0), CU130, True) for major in (9, 10, 12)),
        ((13, 0), CU130, True),  # from the PTX
        ((13, 0), CU130[:-1], False),
        ((8, 6), ("sm_80",), True),
        ((8, 0), ("sm_86",), False),
        ((9, 0), ("sm_80", "sm_86"), False),
        ((7, 5), ("sm_80", "compute_80"), False),
        ((9, 0), ("sm_80", "compute_80"), True),
        ((9, 0), ("sm_90a",), True),
        ((10, 0), ("compute_90a",), False),
        ((10, 3), ("sm_100f",), True),
        ((12, 0), ("compute_100f",), False),
        ((9, 0), ("gfx90a",), True),
    ],
)
def test_a_gpu_runs_what_was_built_for_its_family_and_any_older_ptx(
    capability: tuple[int, int], built_for: tuple[str, ...], expected: bool
) -> None:
    assert has_kernels(capability, built_for) is expected


@pytest.fixture
def old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch see a GPU that its build has no kernels for."""
    for name, value in (
        *(("is_available", True), ("get_device_capability", (7, 0))),
        *(("get_arch_list", list(CU130)), ("get_device_name", "Tesla V100-SXM2-16GB")),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)


@pytest.mark.usefixtures("old_gpu")
def test_a_gpu_without_kernels_is_refused_in_one_sentence_by_every_verb(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "The GPU Tesla V100-SXM2-16GB has compute capability 7.0, and torch"
    argv = ["--pretrained-model=tiny", f"--train={DATA / 'cat'}", f"--model_dir={tmp_path / 'm'}"]
    assert run_job([*argv, "--max_steps=1"], {"SAGEMAKER_BASE_DIR": str(tmp_path)}) == 1
    assert words in (tmp_path / "output" / "failure").read_text()
    assert "Plan" not in capsys.readouterr().out
    for device in ("auto", "cuda"):
        with pytest.raises(UserError, match=words):  # the server gives up at once
            open_engine(WEIGHTS, ServeSettings(model="", device=device))
    drawing = ["generate", "--model", str(WEIGHTS), "--prompt", "a cat"]
    assert main([*drawing, "--out", str(tmp_path / "pictures")]) == 1
    assert words in capsys.readouterr().err
    open_engine(WEIGHTS, ServeSettings(model="", device="cpu")).close(drain=False)


def test_without_a_gpu_no_kernels_are_missed() -> None:
    gpu_driver.refuse_gpu_without_kernels(torch)
