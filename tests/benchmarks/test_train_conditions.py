"""The conditions of a benchmark: a memory cap and a T4's settings.

They need a GPU, so only the calls made to torch and to the job are tested here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import provenance, train
from benchmarks.__main__ import main
from benchmarks.train_step import ours, processes, work
from benchmarks.train_step.conditions import GIB, Conditions
from benchmarks.train_step.ours import RunScale, Setting, Subject
from benchmarks.train_step.processes import Ended
from benchmarks.train_step.result import TrainResult
from dreambooth import tiny
from dreambooth.training import device as devices
from dreambooth.training.device import DeviceFacts

CARD = DeviceFacts(kind="cuda", name="Tesla T4", compute_capability=(9, 0))
JOB = {"with_prior_preservation": True, "fast_step": False, "whole_job": True}


def torch_of(total_gib: float, said: list[Any]) -> Any:
    cuda = SimpleNamespace(
        current_device=lambda: 0,
        get_device_properties=lambda _: SimpleNamespace(total_memory=int(total_gib * GIB)),
        set_per_process_memory_fraction=lambda share, device: said.append((share, device)),
    )
    backends = SimpleNamespace(
        enable_flash_sdp=lambda on: said.append(("flash", on)),
        enable_cudnn_sdp=lambda on: said.append(("cudnn", on)),
    )
    return SimpleNamespace(cuda=cuda, backends=SimpleNamespace(cuda=backends))


@pytest.mark.parametrize(
    ("conditions", "said"),
    [
        (Conditions(), []),
        (Conditions(memory_gib=6.0), [(0.075, 0)]),
        (Conditions(memory_gib=100.0), [(1.0, 0)]),
        (Conditions(as_t4=True), [("flash", False), ("cudnn", False)]),
    ],
)
def test_conditions_are_imposed_on_torch(conditions: Conditions, said: list[Any]) -> None:
    heard: list[Any] = []
    conditions.impose(torch_of(80, heard))
    assert heard == said


def test_a_watched_process_begins_under_them(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\n"
        "print(torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled(),"
        "torch.backends.cuda.mem_efficient_sdp_enabled())\n"
    )
    ended = processes.run(script, [], folder=tmp_path, conditions=Conditions(as_t4=True))
    assert [line.text for line in ended.lines] == ["False False True"]


def test_as_a_t4_the_job_computes_in_fp16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: dict[str, Any] = {}

    def run(script: Path, words: Sequence[object], **named: Any) -> Ended:
        heard.update(named, words=[str(word) for word in words])
        return Ended(exit_code=1, started_at=0.0, seconds=1.0, lines=(), memory=None)

    monkeypatch.setattr(processes, "run", run)
    conditions = Conditions(memory_gib=13.0, as_t4=True)
    subject = Subject(model=tmp_path, photos=tmp_path, device=CARD, conditions=conditions)
    scale = RunScale(steps=9, warm_up=1, class_images=2)
    outcome = ours.run(Setting(**JOB, memory_plan="auto"), subject, scale, tmp_path)
    assert outcome.fault == "exit 1: nothing was said"
    assert heard["conditions"] == conditions
    told = dict(zip(heard["words"][::2], heard["words"][1::2], strict=True))
    wanted = {
        "--mixed_precision": "fp16",
        "--prior_generation_precision": "fp16",
        "--memory_plan": "auto",
        "--compute_fid": "True",
        "--sample_steps": "5",
        "--checkpointing_steps": "5",
    }
    assert wanted.items() <= told.items()


@pytest.mark.parametrize("option", ["--memory_gib=6", "--as_t4"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="what a CPU refuses")
def test_a_cpu_refuses_what_only_a_gpu_has(
    option: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["train", "--quick", option]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{option.partition('=')[0]} is for a run on a CUDA GPU" in line


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list of what `measure` is asked for on a pretended card; nothing runs."""
    asked: list[Any] = []

    def measure(
        subject: Subject, settings: Sequence[Setting], *_: Any, **named: Any
    ) -> TrainResult:
        asked.append((subject.conditions, [asdict(one) for one in settings], named["job_scale"]))
        return TrainResult(rows=(), peak=work.peak(CARD), stand_in=False)

    monkeypatch.setattr(devices, "from_torch", lambda _: CARD)
    monkeypatch.setattr(train, "measure", measure)
    found = {**provenance.facts(torch.device("cpu")), "device": "a card"}
    monkeypatch.setattr(provenance, "facts", lambda _: found)
    return asked


@pytest.mark.parametrize(
    ("options", "conditions", "plan"),
    [
        (["--as_t4"], Conditions(memory_gib=13.0, as_t4=True), "auto"),
        (
            ["--as_t4", "--memory-gib", "10", "--memory_plan", "8bit_adamw"],
            *(Conditions(memory_gib=10.0, as_t4=True), "8bit_adamw"),
        ),
        (["--memory_gib", "6"], Conditions(memory_gib=6.0), "auto"),
    ],
)
def test_under_conditions_one_whole_job_is_run(
    measured: list[Any], options: list[str], conditions: Conditions, plan: str
) -> None:
    assert main(["train", "--model", "tiny", *options]) == 0
    job_scale = RunScale(steps=395, warm_up=5, class_images=100)
    assert measured == [(conditions, [{**JOB, "memory_plan": plan}], job_scale)]


def test_one_plan_alone_is_measured_with_its_job(measured: list[Any]) -> None:
    options = ["--memory_plan", "8bit_adamw_checkpointing", "--quick"]
    assert main(["train", "--model", "tiny", *options]) == 0
    ((_, settings, job_scale),) = measured
    assert {one["memory_plan"] for one in settings} == {"8bit_adamw_checkpointing"}
    assert [one["whole_job"] for one in settings] == [False, False, True]
    assert job_scale.all_steps == 4


@pytest.mark.usefixtures("measured")
def test_a_run_on_a_gpu_states_where_it_was_made(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--as_t4", "--model=tiny"]) == 0
    *shown, line = capsys.readouterr().out.splitlines()
    record = json.loads(line)
    assert shown[0].startswith("device a card, ")
    assert {"driver", "torch", "commit", "date"} <= set(record)
    assert record["conditions"] == {"memory_gib": 13.0, "as_t4": True, "stand_in": False}


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--memory_gib=6", f"--peer={__file__}"], "leave out --memory_gib and --as_t4"),
        (["--memory_gib=0"], "--memory_gib must be above 0"),
    ],
)
def test_what_does_not_go_together_is_refused(
    measured: list[Any], options: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--model", str(tiny.WEIGHTS), *options]) == 1
    assert why in capsys.readouterr().err
    assert measured == []
