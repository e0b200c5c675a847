"""The fast step in the loop, which makes several steps before it reads their metrics."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dreambooth.errors import TrainingDivergedError
from dreambooth.fast import captured_loop
from dreambooth.fast.cuda_graphs import CapturedCall
from dreambooth.fast.graphed_passes import without_capture
from dreambooth.training import state as states

Make = Callable[..., Any]
FAST = {"fast_step": True, "mixed_precision": "bf16"}


def spoiling(step: int, value: float) -> Callable[..., CapturedCall]:
    """Return a capturer that sets a gradient and the losses of one step to `value`."""

    def capture(call: Any, prepare: Any) -> CapturedCall:
        captured, made = without_capture(call, prepare), []

        def replay() -> None:
            made.append(1)
            captured.replay()
            if len(made) == step:
                call.__self__._weights[0].grad.fill_(value)
                captured.output.fill_(value)

        return CapturedCall(replay=replay, output=captured.output)

    return capture


@pytest.mark.parametrize("changes", [{}, {"with_prior_preservation": True, "batch_size": 2}])
def test_reading_late_changes_no_bit(
    make_training: Make, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object]
) -> None:
    late, early = (make_training(max_steps=13, **FAST, **changes) for _ in range(2))
    read_late = list(late.steps())
    monkeypatch.setattr(captured_loop, "READ_EVERY", 1)
    assert list(early.steps()) == read_late
    assert torch.equal(early.weights(), late.weights())
    assert early.state.loss_total == late.state.loss_total
    assert [m.step for m in read_late] == list(range(1, 14))


def test_the_first_the_tenths_the_last_and_those_before_a_save_are_read_at_once(
    make_training: Make,
) -> None:
    def read_at(**changes: object) -> list[int]:
        training = make_training(max_steps=23, **{**FAST, **changes})
        is_read = captured_loop.reading_steps(training.state, training.plan, training.settings)
        return [step for step in range(1, 24) if is_read(step)]

    assert read_at() == [1, 10, 20, 23]
    assert read_at(checkpointing_steps=8, sample_steps=7) == [1, 7, 8, 10, 14, 16, 20, 21, 23]
    assert read_at(mixed_precision="fp16") == list(range(1, 24))


def test_metrics_come_together_once_all_their_steps_are_made(make_training: Make) -> None:
    training = make_training(max_steps=12, **FAST)
    seen = [(m.step, m.read_with, training.state.step) for m in training.steps()]
    assert seen == [(1, 1, 1), *((step, 9, 10) for step in range(2, 11)), (11, 2, 12), (12, 2, 12)]


@pytest.mark.parametrize("step", [1, 2, 5, 10])
def test_the_step_that_diverged_is_named_though_later_ones_are_made(
    make_training: Make, step: int
) -> None:
    training = make_training(max_steps=12, **FAST)
    steps = training.steps(spoiling(step, math.nan))
    if step > 1:
        assert next(steps).step == 1
    # None of the steps made in the meantime is reported, let alone saved.
    with pytest.raises(TrainingDivergedError, match=f"not finite at step {step} ") as caught:
        next(steps)
    assert caught.value.step == step


def test_an_overflowing_fp16_step_is_tried_again_before_the_next(make_training: Make) -> None:
    training = make_training(max_steps=4, **{**FAST, "mixed_precision": "fp16"})
    seen: list[int] = []

    def capture(call: Any, prepare: Any) -> CapturedCall:
        captured = without_capture(call, prepare)

        def replay() -> None:
            captured.replay()
            seen.append(training.state.step)
            if len(seen) == 2:
                call.__self__._weights[0].grad.fill_(math.inf)

        return CapturedCall(replay=replay, output=captured.output)

    assert [m.step for m in training.steps(capture)] == [1, 2, 3, 4]
    assert seen == [0, 1, 1, 2, 3]
    assert training.state.skipped_steps == 1


def test_without_the_fast_step_a_run_resumes_from_its_checkpoint(
    make_training: Make, tmp_path: Path
) -> None:
    changes = {"max_steps": 6, "mixed_precision": "bf16", "checkpointing_steps": 3}
    fast = make_training(fast_step=True, **changes)
    for metrics in fast.steps():
        if metrics.step == 3:
            states.save(fast.state, tmp_path, identity={}, keep=1)
            break
    for smaller in ({}, {"use_8bit_adam": True}):
        plain = make_training(**changes, **smaller)
        assert states.load_newest(plain.state, tmp_path, identity={})
        assert torch.equal(plain.weights(), fast.weights())
        assert {p.dtype for p in plain.state.unet.parameters()} == {torch.float32}
        assert [metrics.step for metrics in plain.steps()] == [4, 5, 6]


def test_prior_prediction_aims_at_the_base_model(make_training: Make) -> None:
    prior = {"with_prior_preservation": True, "prior_preservation_mode": "prediction"}
    metrics = list(make_training(max_steps=3, **FAST, **prior).steps())
    # Half-precision weights and autocast round differently, so the class loss is only near zero.
    assert metrics[0].class_loss is not None
    assert metrics[0].class_loss < 1e-3 * metrics[0].instance_loss
    assert metrics[2].class_loss > metrics[0].class_loss
