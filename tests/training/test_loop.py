from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dreambooth.errors import TrainingDivergedError
from dreambooth.training import loop
from dreambooth.training import state as states

Make = Callable[..., Any]


def test_two_runs_with_one_seed_give_bit_identical_weights(make_training: Make) -> None:
    runs = [make_training(seed=5, with_prior_preservation=True) for _ in range(2)]
    metrics = [list(run.steps()) for run in runs]
    assert metrics[0] == metrics[1]
    assert torch.equal(runs[0].weights(), runs[1].weights())


def test_another_seed_gives_other_weights(make_training: Make) -> None:
    runs = [make_training(seed=seed) for seed in (0, 1)]
    for run in runs:
        list(run.steps())
    assert not torch.equal(runs[0].weights(), runs[1].weights())


def test_the_global_random_state_does_not_matter(make_training: Make) -> None:
    first, second = make_training(), make_training()
    torch.manual_seed(1)
    list(first.steps())
    torch.manual_seed(2)
    for _ in second.steps():
        torch.rand(3)  # a preview between steps might draw random numbers
    assert torch.equal(first.weights(), second.weights())


def test_four_accumulated_micro_batches_equal_one_of_four(make_training: Make) -> None:
    accumulated = make_training(gradient_accumulation_steps=4, with_prior_preservation=True)
    whole = make_training(batch_size=4, with_prior_preservation=True)
    before = whole.weights()
    a, b = list(accumulated.steps()), list(whole.steps())
    for left, right in zip(a, b, strict=True):
        assert left.loss == pytest.approx(right.loss, rel=1e-4)
        assert left.grad_norm == pytest.approx(right.grad_norm, rel=1e-3)
    moved, expected = accumulated.weights() - before, whole.weights() - before
    assert float((moved - expected).norm() / expected.norm()) < 0.02


def test_every_accumulation_window_weighs_alike(make_training: Make) -> None:
    # 3 pictures and windows of 4: a loader with epochs would give windows of 3 and 1.
    training = make_training(gradient_accumulation_steps=4, max_steps=6, learning_rate=1e-12)
    seen: list[int] = []
    original = loop.make_micro_batch

    def count(*arguments: Any, **keywords: Any) -> loop.MicroBatch:
        seen.extend(arguments[1])
        return original(*arguments, **keywords)

    loop.make_micro_batch = count  # type: ignore[assignment]
    try:
        metrics = list(training.steps())
    finally:
        loop.make_micro_batch = original
    assert seen == list(range(24))
    assert [m.step for m in metrics] == [1, 2, 3, 4, 5, 6]


def test_prior_loss_weight_zero_is_prior_preservation_off(make_training: Make) -> None:
    off = make_training(max_steps=2)
    zero = make_training(max_steps=2, with_prior_preservation=True, prior_loss_weight=0.0)
    before = off.weights()
    a, b = list(off.steps()), list(zero.steps())
    assert [m.loss for m in a] == pytest.approx([m.loss for m in b], rel=1e-4)
    moved, expected = zero.weights() - before, off.weights() - before
    assert float((moved - expected).norm() / expected.norm()) < 0.01
    assert all(m.class_loss is None for m in a)
    assert all(m.class_loss is not None and m.class_loss > 0 for m in b)


def test_both_losses_are_logged_apart_and_add_up(make_training: Make) -> None:
    training = make_training(with_prior_preservation=True, prior_loss_weight=0.25)
    for metrics in training.steps():
        assert metrics.loss == pytest.approx(
            metrics.instance_loss + 0.25 * metrics.class_loss, rel=1e-6
        )


def test_the_global_norm_is_clipped(make_training: Make) -> None:
    training = make_training(max_grad_norm=1e-3, max_steps=1)
    steps = training.steps()
    norms = []
    original = training.state.optimizer.step

    def look(*arguments: Any, **keywords: Any) -> Any:
        gradients = [p.grad for p in training.state.unet.parameters() if p.grad is not None]
        norms.append(torch.cat([g.flatten() for g in gradients]).norm().item())
        return original(*arguments, **keywords)

    training.state.optimizer.step = look
    metrics = next(steps)
    assert metrics.grad_norm > 1e-2
    assert norms == [pytest.approx(1e-3, rel=1e-3)]


@pytest.mark.parametrize("limit", [1e3, 1e-3])
def test_gradients_are_clipped_to_the_bits_of_torchs_own_clipping(
    make_training: Make, limit: float
) -> None:
    """A norm below the limit leaves the gradients untouched: no factor of 1 is applied."""
    training = make_training(max_grad_norm=limit, max_steps=1)
    weights = list(training.state.unet.parameters())
    arrived: dict[int, torch.Tensor] = {}
    stepped: list[torch.Tensor] = []
    for weight in weights:
        weight.register_post_accumulate_grad_hook(
            lambda weight: arrived.__setitem__(id(weight), weight.grad.clone())
        )
    training.state.optimizer.register_step_pre_hook(
        lambda *_: stepped.extend(weight.grad.clone() for weight in weights)
    )
    (metrics,) = training.steps()
    for weight in weights:
        weight.grad = arrived[id(weight)]
    assert float(torch.nn.utils.clip_grad_norm_(weights, limit)) == metrics.grad_norm
    assert all(torch.equal(w.grad, s) for w, s in zip(weights, stepped, strict=True))


def test_the_learning_rate_follows_its_curve(make_training: Make) -> None:
    training = make_training(lr_scheduler="linear", learning_rate=1e-3, max_steps=4)
    rates = [metrics.learning_rate for metrics in training.steps()]
    assert rates == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])
    assert training.state.optimizer.param_groups[0]["lr"] == pytest.approx(0.25e-3)


def test_the_text_encoder_learns_when_asked_to(make_training: Make) -> None:
    training = make_training(train_text_encoder=True, max_steps=2)
    before = [p.detach().clone() for p in training.state.text_encoder.parameters()]
    list(training.steps())
    after = list(training.state.text_encoder.parameters())
    moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert sum(moved) > 0.8 * len(moved)


def test_gradient_checkpointing_changes_memory_not_results(make_training: Make) -> None:
    plain, saving = make_training(), make_training()
    saving.state.unet.enable_gradient_checkpointing()
    list(plain.steps())
    list(saving.steps())
    assert torch.equal(plain.weights(), saving.weights())


def test_prior_prediction_aims_the_class_prompt_at_the_base_model(make_training: Make) -> None:
    training = make_training(
        with_prior_preservation=True, prior_preservation_mode="prediction", max_steps=3
    )
    metrics = list(training.steps())
    # Before the first update the trained model equals the base model, so the class loss is 0.
    assert metrics[0].class_loss == pytest.approx(0.0, abs=1e-9)
    assert metrics[2].class_loss > 1e-8


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_stops_with_step_and_advice(make_training: Make, where: str) -> None:
    training = make_training()
    steps = training.steps()
    next(steps)
    first = next(training.state.unet.parameters())
    if where == "loss":
        first.data.fill_(math.nan)
    else:
        first.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(TrainingDivergedError, match=f"The {where} is not finite at step 2"):
        next(steps)


def test_an_overflowing_fp16_step_is_tried_again_not_counted(make_training: Make) -> None:
    training = make_training(mixed_precision="fp16", max_steps=3)
    weight = next(training.state.unet.parameters())
    overflow = [True]

    def once(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * math.inf if overflow and overflow.pop() else gradient

    weight.register_hook(once)
    metrics = list(training.steps())
    assert [m.step for m in metrics] == [1, 2, 3]
    assert training.state.skipped_steps == 1


def test_fp16_that_always_overflows_ends(make_training: Make) -> None:
    training = make_training(mixed_precision="fp16")
    next(training.state.unet.parameters()).register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(TrainingDivergedError, match="gradient is not finite at step 1"):
        list(training.steps())


def test_masters_stay_fp32_under_autocast(make_training: Make) -> None:
    training = make_training(mixed_precision="bf16", max_steps=2)
    list(training.steps())
    assert {p.dtype for p in training.state.unet.parameters()} == {torch.float32}


def test_prior_prediction_works_while_the_text_encoder_learns(make_training: Make) -> None:
    training = make_training(
        with_prior_preservation=True,
        prior_preservation_mode="prediction",
        train_text_encoder=True,
        max_steps=2,
    )
    metrics = list(training.steps())
    assert metrics[0].class_loss == pytest.approx(0.0, abs=1e-9)
    assert metrics[1].class_loss > 1e-8


def test_divergence_names_the_last_good_checkpoint(make_training: Make, tmp_path: Path) -> None:
    training = make_training()
    steps = training.steps()
    next(steps)
    kept = states.save(training.state, tmp_path, identity={}, keep=1)
    next(training.state.unet.parameters()).data.fill_(math.nan)
    with pytest.raises(TrainingDivergedError, match=f"last good checkpoint is {kept}"):
        next(steps)


def test_advice_on_divergence_depends_on_the_precision(make_training: Make) -> None:
    for precision, advised in (("no", False), ("bf16", True)):
        training = make_training(mixed_precision=precision)
        next(training.state.unet.parameters()).data.fill_(math.nan)
        with pytest.raises(TrainingDivergedError) as caught:
            next(training.steps())
        assert ("mixed_precision=no" in str(caught.value)) is advised
