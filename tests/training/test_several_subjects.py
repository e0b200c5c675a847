"""Several subjects in the training loops: whose picture, prompt, class and loss each sample has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from dreambooth.diffusion import model as models
from dreambooth.training import loop
from dreambooth.training.plan import PlannedSubject
from tests.training.conftest import Training

Make = Callable[..., Training]
PROMPTS = ("a photo of riobugger cat", "a photo of zwx dog")
CLASSES = ("a photo of cat", "a photo of dog")
BY_PREDICTION = {"with_prior_preservation": True, "prior_preservation_mode": "prediction"}


def with_two_subjects(training: Training, *, prompts: tuple[str, str] = PROMPTS) -> Training:
    """Make pictures 0 and 1 those of one subject, and picture 2 that of another."""
    model, settings, data = training.model, training.settings, training.data

    def text(texts: tuple[str, ...]) -> torch.Tensor:
        ids = models.tokenize(model, list(texts))
        return ids if settings.train_text_encoder else models.encode_text(model, ids)

    training.data = replace(
        data,
        instance=replace(data.instance, groups=(range(2), range(2, 3))),
        class_=data.class_ and replace(data.class_, groups=(range(1), range(1, 4))),
        instance_text=text(prompts),
        class_text=None if data.class_text is None else text(CLASSES),
        prior_text=models.encode_text(model, models.tokenize(model, list(CLASSES))),
        text_rows=(0, 0, 1),
        class_rows=(0, 1),
    )
    subjects = tuple(
        PlannedSubject(name=name, instance_images=count, steps_alone=2)
        for name, count in (("cat", 2), ("dog", 1))
    )
    training.plan = replace(training.plan, subjects=subjects)
    return training


def batch(training: Training, numbers: range) -> loop.MicroBatch:
    settings = training.settings
    by_prediction = settings.prior_preservation_mode == "prediction"
    return loop.make_micro_batch(
        training.data,
        numbers,
        models.training_noise_scheduler(training.model),
        settings,
        training.state.precision.frozen_copy(training.model.unet) if by_prediction else None,
    )


def test_each_row_has_its_own_prompt_and_the_prompt_of_its_own_class(make_training: Make) -> None:
    training = with_two_subjects(make_training(with_prior_preservation=True))
    made, data = batch(training, range(1, 5)), training.data
    assert data.class_text is not None
    texts = [data.instance_text[row] for row in (1, 0, 1, 0)]
    texts += [data.class_text[row] for row in (1, 0, 1, 0)]
    assert torch.equal(made.text, torch.stack(texts))
    assert made.subject_rows is not None
    assert made.subject_rows.tolist() == [[0, 1, 0, 1], [1, 0, 1, 0]]


def test_captions_of_pictures_are_their_prompts(make_training: Make) -> None:
    """One subject whose third picture has a prompt of its own."""
    training = with_two_subjects(make_training())
    instance = replace(training.data.instance, groups=())
    training.data = replace(training.data, instance=instance, text_rows=(0, 0, 1))
    made = batch(training, range(3))
    assert made.subject_rows is None
    rows = [int(torch.equal(text, training.data.instance_text[1])) for text in made.text]
    assert sorted(rows) == [0, 0, 1]


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_the_frozen_model_predicts_the_class_of_each_row(make_training: Make, scale: float) -> None:
    training = with_two_subjects(make_training(**BY_PREDICTION, training_guidance_scale=scale))
    made, data = batch(training, range(8)), training.data
    assert data.prior_text is not None
    assert data.prior_empty_text is not None
    # Each subject holds the empty prompt in every other of its own samples.
    is_empty = [scale > 1 and number // 2 % 2 == 1 for number in range(8)]
    held = [
        data.prior_empty_text[0] if e else data.prior_text[n % 2] for n, e in enumerate(is_empty)
    ]
    assert torch.equal(made.text[8:], torch.stack(held))
    with torch.no_grad():
        predicted = loop.predict(
            training.model.unet, made.noisy_latents[8:], made.timesteps[8:], torch.stack(held)
        )
    torch.testing.assert_close(made.target[8:], predicted, rtol=1e-4, atol=1e-5)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"with_prior_preservation": True, "batch_size": 3},
    {**BY_PREDICTION, "training_guidance_scale": 1.5, "batch_size": 2},
    {"train_text_encoder": True, "batch_size": 2},
    {"gradient_accumulation_steps": 3},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_loss_of_each_subject_is_that_of_its_rows(
    make_training: Make, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    training = with_two_subjects(make_training(**settings))
    rows: list[tuple[int, float]] = []
    make, squared = loop.make_micro_batch, loop.squared_errors

    def noted(data: Any, numbers: range, *more: Any) -> loop.MicroBatch:
        rows.extend((number % 2, 0.0) for number in numbers)
        return make(data, numbers, *more)

    def kept(*given: Any) -> torch.Tensor:
        errors = squared(*given)
        for row, error in enumerate(errors.tolist(), start=len(rows) - len(errors)):
            rows[row] = (rows[row][0], error)
        return errors

    monkeypatch.setattr(loop, "make_micro_batch", noted)
    monkeypatch.setattr(loop, "squared_errors", kept)
    for metrics in training.steps():
        of = {name: [e for n, e in rows if n == k] for k, name in enumerate(("cat", "dog"))}
        expected = {name: sum(errors) / len(errors) for name, errors in of.items() if errors}
        assert dict(metrics.subject_losses) == pytest.approx(expected)
        mean = sum(error for _, error in rows) / len(rows)
        assert metrics.instance_loss == pytest.approx(mean, rel=1e-4)
        rows.clear()


def test_other_loops_see_the_same_subjects(make_training: Make) -> None:
    """Freed gradients and the fast step report, and learn, what the plain loop does."""
    settings = {"with_prior_preservation": True, "batch_size": 2}
    plain = with_two_subjects(make_training(**settings))
    expected = [metrics.subject_losses for metrics in plain.steps()]
    freed = with_two_subjects(make_training(**settings, frees_gradients=True))
    assert [metrics.subject_losses for metrics in freed.steps()] == expected
    assert torch.equal(freed.weights(), plain.weights())
    fast = with_two_subjects(make_training(**settings, fast_step=True, mixed_precision="bf16"))
    found = [dict(metrics.subject_losses) for metrics in fast.steps()]
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(dict(other), rel=0.05)


def test_two_processes_average_the_losses_of_each_subject(
    make_training: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two processes with one sample each, each has another subject."""
    training = with_two_subjects(make_training(max_steps=1, learning_rate=1e-9))
    alone = with_two_subjects(make_training(max_steps=1, learning_rate=1e-9, batch_size=2))
    (expected,) = alone.steps()
    training.plan = replace(training.plan, processes=2)
    reduced: list[torch.Tensor] = []
    for process in (0, 1):
        monkeypatch.setattr(Accelerator, "num_processes", 2)
        monkeypatch.setattr(Accelerator, "process_index", process)
        monkeypatch.setattr(
            Accelerator, "reduce", lambda self, losses, how: reduced.append(losses) or losses
        )
        training.state.step = 0
        list(training.steps())
    monkeypatch.setattr(Accelerator, "process_index", 0)
    monkeypatch.setattr(
        Accelerator, "reduce", lambda self, losses, how: (reduced[0] + reduced[1]) / 2
    )
    training.state.step = 0
    (metrics,) = training.steps()
    assert dict(metrics.subject_losses) == pytest.approx(dict(expected.subject_losses), rel=1e-3)


def test_the_prompt_of_a_subject_matters_to_what_is_learned(make_training: Make) -> None:
    one, other = (
        with_two_subjects(make_training(), prompts=prompts)
        for prompts in (PROMPTS, (PROMPTS[0], "a photo of cat"))
    )
    for training in (one, other):
        list(training.steps())
    assert not torch.equal(one.weights(), other.weights())
