from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from dreambooth.errors import TrainingDivergedError

Make = Callable[..., Any]
PRIOR = {"with_prior_preservation": True}
IN_BACKWARD = {"memory_plan": "8bit_adamw_in_backward"}


@contextmanager
def watching(parameters: list[torch.nn.Parameter]) -> Iterator[list[int]]:
    """Yield a list of how many gradients exist at once, each time one more has arrived."""
    counts: list[int] = []

    def count(_: torch.Tensor) -> None:
        counts.append(sum(parameter.grad is not None for parameter in parameters))

    hooks = [parameter.register_post_accumulate_grad_hook(count) for parameter in parameters]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_grad_norm": 1e-3},
        {"mixed_precision": "bf16", **PRIOR},
        {"mixed_precision": "fp16", "max_grad_norm": 1e-3},
        {"use_8bit_adam": True, "gradient_checkpointing": True, **PRIOR},
        {"train_text_encoder": True, "batch_size": 2, "max_grad_norm": 1e-3},
        {"prior_preservation_mode": "prediction", "mixed_precision": "bf16", **PRIOR},
    ],
    ids=["plain", "clipped", "bf16", "fp16 clipped", "8-bit", "text encoder", "prediction"],
)
def test_freed_gradients_train_the_very_same_weights(
    make_training: Make, changes: dict[str, object]
) -> None:
    kept = make_training(max_steps=3, **changes)
    freed = make_training(max_steps=3, frees_gradients=True, **changes)
    assert list(freed.steps()) == list(kept.steps())
    assert torch.equal(freed.weights(), kept.weights())
    if kept.state.text_encoder is not None:
        for a, b in zip(
            kept.state.text_encoder.parameters(),
            freed.state.text_encoder.parameters(),
            strict=True,
        ):
            assert torch.equal(a, b)


def test_the_smallest_plan_trains_the_weights_of_8_bit_adamw(make_training: Make) -> None:
    kept = make_training(memory_plan="8bit_adamw", mixed_precision="fp16", **PRIOR)
    freed = make_training(**IN_BACKWARD, mixed_precision="fp16", **PRIOR)
    assert freed.plan.frees_gradients
    assert list(freed.steps()) == list(kept.steps())
    assert torch.equal(freed.weights(), kept.weights())


def test_few_gradients_stand_beside_each_other(make_training: Make) -> None:
    for freed, few in ((False, False), (True, True)):
        training = make_training(max_steps=1, frees_gradients=freed)
        parameters = list(training.state.unet.parameters())
        with watching(parameters) as counts:
            list(training.steps())
        assert (max(counts) < len(parameters) / 20) is few
        assert all(parameter.grad is None for parameter in parameters)
        assert len(counts) == len(parameters) * (1 + freed)


def test_an_overflowing_fp16_step_is_tried_again_before_any_weight_moves(
    make_training: Make,
) -> None:
    training = make_training(mixed_precision="fp16", frees_gradients=True, max_steps=3)
    plain = make_training(mixed_precision="fp16", max_steps=3)
    for one in (training, plain):
        overflow = [True]

        def once(gradient: torch.Tensor, overflow: list[bool] = overflow) -> torch.Tensor:
            return gradient * math.inf if overflow and overflow.pop() else gradient

        next(one.state.unet.parameters()).register_hook(once)
    assert list(training.steps()) == list(plain.steps())
    assert training.state.skipped_steps == plain.state.skipped_steps == 1
    assert torch.equal(training.weights(), plain.weights())


def test_a_second_pass_that_overflows_alone_ends_the_run(make_training: Make) -> None:
    training = make_training(mixed_precision="fp16", frees_gradients=True)
    calls: list[int] = []

    def second(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return gradient * math.inf if len(calls) == 2 else gradient

    next(training.state.unet.parameters()).register_hook(second)
    with pytest.raises(TrainingDivergedError, match="second backward pass of step 1"):
        list(training.steps())


def test_the_optimizer_is_whole_again_after_a_step_that_broke_off(make_training: Make) -> None:
    training = make_training(frees_gradients=True)
    groups = [list(group["params"]) for group in training.state.optimizer.param_groups]

    def break_off(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    training.state.optimizer.register_step_pre_hook(break_off)
    with pytest.raises(torch.OutOfMemoryError):
        next(training.steps())
    for group, members in zip(training.state.optimizer.param_groups, groups, strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in members]
    assert not any(p._post_accumulate_grad_hooks for p in training.state.unet.parameters())
