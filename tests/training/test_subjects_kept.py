"""Subjects of the base model that a run keeps: what is planned, held and reported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.train_step import full_size
from dreambooth.data.dataset_info import ClassSet, DatasetInfo, SubjectData
from dreambooth.diffusion import model as models
from dreambooth.model_folder.taught_subjects import TaughtSubject
from dreambooth.settings.hyperparameters import Hyperparameters
from dreambooth.training import expected_memory, loop, subjects_kept
from dreambooth.training import plan as plans
from dreambooth.training.device import CPU, DeviceFacts
from tests.training.conftest import Training
from tests.training.test_several_subjects import with_two_subjects

Make = Callable[..., Training]
GIB = 2**30
DOG = TaughtSubject(instance_prompt="a photo of zwx dog", class_prompt="a photo of dog")
CHAIR = TaughtSubject(instance_prompt="a photo of sks chair")
BY_PREDICTION = {"with_prior_preservation": True, "prior_preservation_mode": "prediction"}


def dataset(prompt: str = "a photo of riobugger cat") -> DatasetInfo:
    subject = SubjectData(
        instance_prompt=prompt, class_prompt="a photo of cat", instance_images=(Path("0.png"),)
    )
    return DatasetInfo(
        folder=Path("pictures"),
        subjects=(subject,),
        class_sets=(ClassSet(class_prompt="a photo of cat"),),
    )


def gpu(gib: float) -> DeviceFacts:
    return DeviceFacts(
        kind="cuda", name="NVIDIA A10G", compute_capability=(8, 6), memory_bytes=int(gib * GIB)
    )


def plan(device: DeviceFacts = CPU, *taught: TaughtSubject, **changes: Any) -> plans.TrainingPlan:
    settings = Hyperparameters(**changes)
    return plans.make(settings, dataset(), full_size.FACTS, device, taught=taught)


def test_half_of_the_turns_are_the_kept_subjects() -> None:
    in_turn = subjects_kept.prompts_in_turn([DOG, CHAIR], dataset())
    assert in_turn[:6] == (
        *("a photo of zwx dog", "a photo of dog", "a photo of sks chair", "a photo of cat"),
        *("a photo of zwx dog", ""),
    )
    counts = Counter(in_turn)
    assert counts["a photo of zwx dog"] == counts["a photo of sks chair"] == len(in_turn) / 4
    assert counts["a photo of dog"] == counts["a photo of cat"] == counts[""] == len(in_turn) / 6
    assert subjects_kept.prompts_in_turn([], dataset()) == ()


def test_a_subject_that_is_taught_again_is_not_held_against_it() -> None:
    again = dataset("A photo of  zwx dog")
    found = subjects_kept.subjects_to_keep(Hyperparameters(), again, [DOG, CHAIR])
    assert found == (CHAIR,)
    off = Hyperparameters(keep_subjects="False")
    assert subjects_kept.subjects_to_keep(off, again, [DOG, CHAIR]) == ()


def test_the_plan_names_whom_it_keeps_and_counts_time_and_memory() -> None:
    without, keeps = plan(gpu(80)), plan(gpu(80), DOG, CHAIR)
    assert without.kept_subjects == ()
    assert keeps.kept_subjects == (DOG, CHAIR)
    row = dict(plans.rows(keeps, Hyperparameters()))["kept subjects"]
    assert row.startswith("'a photo of zwx dog', 'a photo of sks chair', by the base's own pred")
    assert "a step takes about 2.3 times as long" in row
    assert "kept subjects" not in dict(plans.rows(without, Hyperparameters()))
    more = keeps.memory_bytes - without.memory_bytes
    frozen = 2 * full_size.FACTS.unet_parameters
    assert more > frozen  # the frozen base in half precision, and the rows' activations
    assert keeps.warnings == ()
    guided = Hyperparameters(**BY_PREDICTION, training_guidance_scale=1.5)  # type: ignore[arg-type]
    made = plans.make(guided, dataset(), full_size.FACTS, gpu(80), taught=[DOG])
    assert "about 1.5 times" in dict(plans.rows(made, guided))["kept subjects"]


def test_hostile_prompts_are_shown_escaped() -> None:
    evil = TaughtSubject(instance_prompt="a \x1b[2J\nforged line " + "x" * 3_000)
    text = plans.describe(plan(gpu(80), evil), Hyperparameters())
    (line,) = [line for line in text.splitlines() if "kept subjects" in line]
    assert "\x1b" not in text
    assert len(line) < 300


def test_without_room_auto_keeps_nothing_and_says_so_once() -> None:
    tight, roomy = plan(gpu(7)), plan(gpu(80), DOG)
    assert tight.warnings == ()  # such a run fits
    auto = plan(gpu(7), DOG)
    assert auto.kept_subjects == ()
    assert [one for one in auto.warnings if "may forget" in one] == list(auto.warnings)
    assert replace(auto, warnings=()) == tight
    forced = plan(gpu(7), DOG, keep_subjects="True")
    assert forced.kept_subjects == roomy.kept_subjects == (DOG,)
    assert plan(gpu(7), DOG, keep_subjects="False") == tight


def test_a_base_without_subjects_has_nothing_to_keep() -> None:
    (warning,) = plan(gpu(80), keep_subjects="True").warnings
    assert warning.startswith("keep_subjects=True has no effect")
    assert plan(gpu(80)).warnings == plan(gpu(80), keep_subjects="False").warnings == ()


def test_phases_after_training_hold_the_frozen_copy_too() -> None:
    settings = Hyperparameters(sample_steps=1)
    peaks = [
        {
            peak.phase: peak.bytes
            for peak in expected_memory.of_phases(
                settings,
                full_size.FACTS,
                mixed_precision="bf16",
                prior_precision="bf16",
                memory_plan=plans.memory_plan.MEMORY_PLANS["fp32_adamw"],
                keeps_subjects=keeps,
            )
        }
        for keeps in (False, True)
    ]
    frozen = 2 * full_size.FACTS.unet_parameters
    for phase in ("sample pictures", "export"):
        assert peaks[1][phase] - peaks[0][phase] == frozen
    assert peaks[1]["encoding"] == peaks[0]["encoding"]


def keeping(training: Training) -> Training:
    """Let a training keep a dog and a chair."""
    in_turn = subjects_kept.prompts_in_turn([DOG, CHAIR], dataset())
    prompts = list(dict.fromkeys(in_turn))
    ids = models.tokenize(training.model, prompts)
    text = models.encode_text(training.model, ids)
    training.data = replace(
        training.data,
        kept_text=ids if training.settings.train_text_encoder else text,
        kept_prior_text=text,
        kept_rows=tuple(prompts.index(prompt) for prompt in in_turn),
    )
    training.plan = replace(training.plan, kept_subjects=(DOG, CHAIR))
    return training


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("settings", [{}, {"with_prior_preservation": True}, BY_PREDICTION])
def test_kept_rows_are_what_the_base_predicts_for_them(
    make_training: Make, settings: dict[str, Any], several: bool
) -> None:
    training = make_training(**settings)
    subjects = 2 if several else 1
    if several:
        with_two_subjects(training)
    scheduler = models.training_noise_scheduler(training.model)
    frozen = training.state.precision.frozen_copy(training.model.unet)
    without = loop.make_micro_batch(training.data, range(6), scheduler, training.settings, frozen)
    keeping(training)
    made = loop.make_micro_batch(training.data, range(6), scheduler, training.settings, frozen)
    for name in ("noisy_latents", "timesteps", "text", "target"):  # the other rows stay the same
        assert torch.equal(getattr(made, name)[:-6], getattr(without, name))
    data = training.data
    assert data.kept_text is not None
    rows = [data.kept_rows[number // subjects] for number in range(6)]
    assert torch.equal(made.text[-6:], data.kept_text[rows])
    assert torch.equal(made.noisy_latents[-6:], without.noisy_latents[:6])
    with torch.no_grad():
        predicted = loop.predict(
            frozen, made.noisy_latents[-6:], made.timesteps[-6:], made.text[-6:]
        )
    torch.testing.assert_close(made.target[-6:], predicted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"train_text_encoder": True},
        {"with_prior_preservation": True, "batch_size": 2},
        {**BY_PREDICTION, "gradient_accumulation_steps": 2, "training_guidance_scale": 1.5},
    ],
)
def test_the_kept_loss_is_reported_and_part_of_the_loss(
    make_training: Make, settings: dict[str, Any]
) -> None:
    training = keeping(with_two_subjects(make_training(**settings)))
    first, *others = training.steps()
    assert first.kept_loss == pytest.approx(0, abs=1e-9)  # nothing is forgotten yet
    for metrics in others:
        assert metrics.kept_loss is not None
        assert metrics.kept_loss > 0
        parts = (metrics.instance_loss, metrics.class_loss or 0, metrics.kept_loss)
        assert metrics.loss == pytest.approx(sum(parts), rel=1e-5)
        assert metrics.subject_losses


def test_less_is_forgotten(make_training: Make) -> None:
    """The prediction for a kept prompt stays nearer to the base's than without keeping it."""
    moved = []
    for prepare in (lambda training: training, keeping):
        training = prepare(make_training(max_steps=30, learning_rate=1e-3))
        frozen = training.state.precision.frozen_copy(training.model.unet)
        list(training.steps())
        ids = models.tokenize(training.model, [DOG.instance_prompt])
        text = models.encode_text(training.model, ids)
        latents = training.data.instance.mean[:1]
        with torch.no_grad():
            pair = [
                loop.predict(unet, latents, torch.tensor([500]), text)
                for unet in (training.state.unet, frozen)
            ]
        moved.append(float((pair[0] - pair[1]).square().mean()))
    assert moved[1] < 0.5 * moved[0]


def test_other_loops_keep_alike(make_training: Make) -> None:
    plain = keeping(make_training(**BY_PREDICTION))
    expected = [(metrics.loss, metrics.kept_loss) for metrics in plain.steps()]
    freed = keeping(make_training(**BY_PREDICTION, frees_gradients=True))
    assert [(metrics.loss, metrics.kept_loss) for metrics in freed.steps()] == expected
    assert torch.equal(freed.weights(), plain.weights())
    fast = keeping(make_training(**BY_PREDICTION, fast_step=True, mixed_precision="bf16"))
    assert [metrics.loss for metrics in fast.steps()] == pytest.approx(
        [loss for loss, _ in expected], rel=0.1
    )
