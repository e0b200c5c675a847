"""Memory and CUDA graphs at the size of Stable Diffusion 2.1 base, which only a GPU can show."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.train_step import full_size, graph_check, ours
from benchmarks.train_step.conditions import GIB, T4_MEMORY_GIB, Conditions
from benchmarks.train_step.goals import RESERVED_GIB
from benchmarks.train_step.graph_check import GraphCheck
from benchmarks.train_step.ours import RunFigures, RunScale, Setting, Subject
from dreambooth import tiny
from dreambooth.fast.cuda_graphs import CudaGraphCapturer
from dreambooth.settings.hyperparameters import MEMORY_PLANS, Hyperparameters
from dreambooth.training import device as devices
from dreambooth.training import expected_memory
from dreambooth.training.memory_plan import MARGIN, OVERHEAD_BYTES


def expected_gib(plan: str) -> float:
    """Return what the planner expects of a step with prior preservation at 512 x 512."""
    expected = expected_memory.of_step(
        Hyperparameters(with_prior_preservation=True),
        full_size.FACTS,
        mixed_precision="bf16",
        memory_plan=MEMORY_PLANS[plan],
    )
    return expected / GIB


# Reserved memory. fp32 AdamW's is the least free memory for which the planner chooses it.
GOALS_GIB = {
    "fp32_adamw": expected_gib("fp32_adamw") * MARGIN + OVERHEAD_BYTES / GIB,
    **RESERVED_GIB,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, small_model_folder: Path) -> Path:
    """Return a full-size model folder on a GPU, the miniature one on a CPU."""
    if not torch.cuda.is_available():
        return small_model_folder
    full_size.write_model(folder := tmp_path_factory.mktemp("base"))
    return folder


def run(base: Path, folder: Path, setting: Setting, conditions: Conditions) -> RunFigures:
    subject = Subject(
        model=base,
        photos=tiny.DATA / "dog1_8",
        device=devices.from_torch(torch),
        conditions=conditions,
    )
    class_images = 8 if subject.device.kind == "cuda" else 1
    scale = RunScale(steps=2, warm_up=1, class_images=class_images)
    outcome = ours.run(setting, subject, scale, folder)
    assert outcome.figures is not None, outcome.fault
    return outcome.figures


@pytest.mark.gpu
def test_a_whole_job_runs_as_on_a_t4(base: Path, tmp_path: Path, device: torch.device) -> None:
    cap = T4_MEMORY_GIB if device.type == "cuda" else None
    setting = Setting(with_prior_preservation=True, memory_plan="auto", whole_job=True)
    figures = run(base, tmp_path, setting, Conditions(memory_gib=cap, as_t4=True))
    assert figures.memory is not None
    phases = figures.memory.phases
    wanted = {"class images", "training", "sample pictures", "checkpoints", "export", "fid_score"}
    assert wanted <= set(phases)
    for name in wanted:
        reserved = phases[name].reserved
        assert (reserved is None) == (cap is None)
        assert reserved is None or reserved <= T4_MEMORY_GIB * GIB
    log = (tmp_path / "output" / "report.html").read_text("utf-8")
    assert "fp16 with loss scaling" in log
    assert "no fid_score" not in log


@pytest.mark.parametrize("plan", list(GOALS_GIB))
def test_a_goal_is_above_what_the_planner_expects(plan: str) -> None:
    assert expected_gib(plan) * MARGIN < GOALS_GIB[plan]


@pytest.mark.gpu
@pytest.mark.parametrize("plan", list(MEMORY_PLANS))
def test_the_peak_is_what_the_plan_expects_and_within_its_goal(
    base: Path, tmp_path: Path, plan: str
) -> None:
    setting = Setting(with_prior_preservation=True, memory_plan=plan)
    goal = GOALS_GIB.get(plan)  # this is also the cap: a job that needs more fails
    figures = run(base, tmp_path, setting, Conditions(memory_gib=goal))
    assert figures.memory is not None
    assert figures.memory.reserved is not None
    assert goal is None or figures.memory.reserved <= goal * GIB
    assert figures.of_expected == pytest.approx(1, abs=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("mixed_precision", ["bf16", "fp16"])
def test_replays_of_a_graph_are_bit_equal_to_eager_calls(
    base: Path, device: torch.device, mixed_precision: str
) -> None:
    capturer = CudaGraphCapturer(torch.device("cuda", torch.cuda.current_device()))
    found = graph_check.check(
        base, device, mixed_precision=mixed_precision, pictures=2, capture=capturer.capture
    )
    assert found == GraphCheck(captured=True, eager_repeats=True, graph_equals_eager=True)
