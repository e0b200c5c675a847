"""All memory plans train the same model; runs repeat, resume and survive running out of memory.

These tests run on the device of this machine. The reference is the plain fp32 loop of
tests/training/plain_loop.py on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dreambooth.diffusion import model as models
from dreambooth.settings.hyperparameters import MEMORY_PLANS, Hyperparameters
from tests.gpu.conftest import DEVICE, Start, weights
from tests.training import plain_loop
from tests.training.displacements import Weights, agreement

STEPS = 50 if DEVICE == "cuda" else 10  # tests/training/test_parity.py runs 25 on a CPU
PRIOR = "--with_prior_preservation=True"
FAST = "--fast_step=True"
PLANS = [f"--memory_plan={name}" for name in MEMORY_PLANS]


def on_a_gpu(*options: tuple[str, ...]) -> list[Any]:
    """Mark what tests/training and tests/job show on a CPU; a CPU is shown a few of all here."""
    return [pytest.param(each, marks=pytest.mark.gpu) for each in options]


def equal(one: Weights, other: Weights) -> bool:
    """Return whether all weights are equal bit for bit."""
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


@pytest.fixture
def fast_step(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Allow the fast step on a CPU, where everything but the capture works."""
    if device.type == "cpu":
        monkeypatch.setattr(
            "dreambooth.training.memory_plan.fast_step_obstacle", lambda *_, **__: None
        )


@pytest.fixture(scope="module")
def reference(small_model_folder: Path, pictures: Path) -> torch.nn.Module:
    """Return the U-Net after the plain loop's steps at the published learning rate."""
    world = plain_loop.World(
        model=models.load(small_model_folder, device=torch.device("cpu")),
        instances=sorted(pictures.glob("*.png")),
        classes=sorted((pictures / "class_data_dir").glob("*.png")),
    )
    settings = Hyperparameters(max_steps=STEPS, with_prior_preservation=True)
    trained = plain_loop.trained_copies(world, settings)
    plain_loop.train(world, trained, settings)
    return trained["unet"]


@pytest.mark.usefixtures("fast_step")
@pytest.mark.parametrize(
    "options",
    [
        (FAST, "--mixed_precision=bf16"),
        *on_a_gpu(
            ("--mixed_precision=no",),
            *(("--mixed_precision=bf16", plan) for plan in PLANS),
            ("--mixed_precision=fp16",),
            (FAST, "--mixed_precision=fp16"),
        ),
    ],
    ids=" ".join,
)
def test_each_plan_learns_what_the_reference_learns(
    start: Start, small_model_folder: Path, reference: torch.nn.Module, options: tuple[str, ...]
) -> None:
    own = weights(start("mine", f"--max_steps={STEPS}", PRIOR, *options))
    cosine, ratio = agreement(weights(small_model_folder), own, reference.state_dict())
    assert cosine >= 0.99
    assert ratio == pytest.approx(1, abs=0.02)


EXACT = (PRIOR, "--max_steps=4", "--learning_rate=1e-4", "--deterministic=True")
WAYS = [
    ("--memory_plan=8bit_adamw_in_backward",),
    (FAST, "--mixed_precision=bf16"),
    *on_a_gpu(
        *((plan,) for plan in PLANS if "8bit_adamw_in_backward" not in plan),
        ("--mixed_precision=fp16",),
        (FAST, "--mixed_precision=fp16", "--memory_plan=8bit_adamw"),
    ),
]


@pytest.fixture
def interrupted(device: torch.device) -> Iterator[Callable[[bool], None]]:
    """Yield a function that makes one update after the third step run out of memory.

    Its argument says whether only AdamW in fp32 fails, or any optimizer.
    """
    armed: list[bool] = []

    def hook(optimizer: torch.optim.Optimizer, *_: object) -> None:
        if armed and next(iter(optimizer.state.values()), {"step": 0})["step"] == 3:
            if armed[0] and type(optimizer) is not torch.optim.AdamW:
                return
            armed.clear()
            if device.type == "cuda":
                torch.empty(2**50, dtype=torch.uint8, device=device)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1024 TiB")

    handle = register_optimizer_step_pre_hook(hook)
    yield armed.append
    handle.remove()


@pytest.mark.usefixtures("fast_step")
@pytest.mark.parametrize("options", WAYS, ids=" ".join)
def test_a_deterministic_run_repeats_and_resumes_bit_for_bit(
    start: Start,
    options: tuple[str, ...],
    tmp_path: Path,
    interrupted: Callable[[bool], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = weights(start("first", *EXACT, *options))
    assert equal(weights(start("again", *EXACT, *options)), first)
    named = () if any("plan" in option for option in options) else ("--memory_plan=fp32_adamw",)
    kept = (f"--checkpoint_dir={tmp_path / 'kept'}", "--checkpointing_steps=2", *named)
    interrupted(False)  # a memory plan that was named is not replaced, so the job fails
    start("resumed", *EXACT, *options, *kept, code=1)
    assert equal(weights(start("resumed", *EXACT, *options, *kept)), first)
    assert "resumed at step 2" in capsys.readouterr().err


@pytest.mark.usefixtures("fast_step")
@pytest.mark.parametrize(
    "options", on_a_gpu((), (FAST, "--mixed_precision=bf16")), ids=["plain", "fast"]
)
def test_out_of_memory_resumes_with_the_next_plan(
    start: Start,
    options: tuple[str, ...],
    interrupted: Callable[[bool], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    interrupted(True)
    moved = weights(start("moved", *EXACT, *options))
    shown = capsys.readouterr().err
    assert "memory ran out with memory_plan fp32_adamw: going on with 8bit_adamw" in shown
    named = weights(start("named", *EXACT, *options, "--memory_plan=8bit_adamw"))
    assert equal(moved, named)
