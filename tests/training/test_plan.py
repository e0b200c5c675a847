from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.train_step.full_size import FACTS as FULL_SIZE
from dreambooth.data.dataset_info import DatasetInfo
from dreambooth.settings.hyperparameters import Hyperparameters
from dreambooth.training import plan as plans
from dreambooth.training import plan_warnings
from dreambooth.training.device import CPU, DeviceFacts
from dreambooth.training.expected_memory import PhasePeak

GIB = 2**30
T4 = DeviceFacts(kind="cuda", name="Tesla T4", compute_capability=(7, 5), memory_bytes=15 * GIB)
A10G = DeviceFacts(
    kind="cuda", name="NVIDIA A10G", compute_capability=(8, 6), memory_bytes=22 * GIB
)


def dataset(instances: int = 8, classes: int = 0) -> DatasetInfo:
    return DatasetInfo(
        folder=Path("pictures"),
        instance_prompt="a photo of a riobugger cat",
        class_prompt="a photo of a cat",
        instance_images=tuple(Path(f"{n}.png") for n in range(instances)),
        class_images=tuple(Path(f"{n}.png") for n in range(classes)),
        warnings=(),
    )


def make(device: DeviceFacts = CPU, classes: int = 0, **changes: object) -> plans.TrainingPlan:
    settings = Hyperparameters(**changes)  # type: ignore[arg-type]
    return plans.make(settings, dataset(classes=classes), FULL_SIZE, device)


def test_the_published_defaults_train_160_steps_on_eight_pictures() -> None:
    assert make().steps == 160
    assert make().epochs == 20


def test_epochs_count_instance_images_with_prior_preservation_too() -> None:
    plan = make(with_prior_preservation=True)
    assert plan.steps == 160
    assert plan.steps_by_longer_set == 2000
    text = plans.describe(plan, Hyperparameters(with_prior_preservation=True))
    assert "160 (20 epochs of 8 instance images)" in text
    assert "2000 steps" in text


def test_max_steps_overrides_epochs() -> None:
    assert make(max_steps=400).steps == 400
    assert make(max_steps=400).epochs == 50


def test_a_step_is_batch_times_accumulation() -> None:
    assert make(batch_size=3, gradient_accumulation_steps=2, epochs=10).steps == 14


def test_missing_class_images_are_counted() -> None:
    plan = make(with_prior_preservation=True, classes=30)
    assert (plan.class_images, plan.class_images_to_sample) == (100, 70)
    plan = make(with_prior_preservation=True, classes=130)
    assert (plan.class_images, plan.class_images_to_sample) == (130, 0)
    plan = make(with_prior_preservation=True, prior_preservation_mode="prediction", classes=30)
    assert (plan.class_images, plan.class_images_to_sample) == (0, 0)


@pytest.mark.parametrize(
    ("device", "training", "sampling"),
    [(CPU, "no", "no"), (T4, "fp16", "fp16"), (A10G, "bf16", "bf16")],
    ids=["CPU", "T4", "A10G"],
)
def test_precision_is_chosen_by_the_device(
    device: DeviceFacts, training: str, sampling: str
) -> None:
    plan = make(device)
    assert (plan.mixed_precision, plan.prior_generation_precision) == (training, sampling)
    plan = make(device, mixed_precision="no", prior_generation_precision="fp32")
    assert (plan.mixed_precision, plan.prior_generation_precision) == ("no", "no")
    settings = Hyperparameters(mixed_precision="no")
    in_tf32 = "fp32 (convolutions in TF32, torch's default), fp32 weights"
    assert (in_tf32 in plans.describe(plan, settings)) is (device is A10G)
    assert "TF32" not in plans.describe(make(device), Hyperparameters())


def test_the_memory_plan_is_the_fastest_that_fits() -> None:
    assert make(A10G).memory_plan == "fp32_adamw"
    small = replace(T4, memory_bytes=12 * GIB)
    assert make(small).memory_plan == "8bit_adamw"
    assert make(small).use_8bit_adam
    tiny = replace(T4, memory_bytes=6 * GIB)
    assert make(tiny).memory_plan == "8bit_adamw_in_backward"
    assert make(tiny).gradient_checkpointing
    assert make(tiny).frees_gradients


def test_out_of_memory_there_is_a_smaller_plan_until_the_last() -> None:
    plan: plans.TrainingPlan | None = make(A10G)
    found = []
    while plan is not None:
        found.append((plan.memory_plan, plan.use_8bit_adam, plan.frees_gradients))
        expected, plan = plan.memory_bytes, plan.with_smaller_memory_plan()
        assert plan is None or 0 < plan.memory_bytes < expected
    assert found == [
        ("fp32_adamw", False, False),
        ("8bit_adamw", True, False),
        ("8bit_adamw_checkpointing", True, False),
        ("8bit_adamw_in_backward", True, True),
    ]
    assert make(A10G, memory_plan="fp32_adamw").with_smaller_memory_plan() is None


def test_the_memory_plan_is_printed_with_its_price_and_its_expected_bytes() -> None:
    text = plans.describe(make(replace(T4, memory_bytes=6 * GIB)), Hyperparameters())
    assert "8bit_adamw_in_backward, gradients freed as they arrive: every pass is made" in text
    assert "expected memory  5.2" in text
    assert "should memory run out, 8bit_adamw" in plans.describe(make(A10G), Hyperparameters())


def test_the_plan_says_which_phase_decides_whether_the_run_fits() -> None:
    small = replace(T4, memory_bytes=6 * GIB)
    settings = Hyperparameters(sample_steps=50)
    made = make(small, sample_steps=50)
    assert "expected memory  5.24 GiB in training; the most, 5.92 GiB, in sample pictures" in (
        plans.describe(made, settings)
    )
    assert made.memory_bytes < max(peak.bytes for peak in made.phases)
    assert "expected memory  13.24 GiB in training, the most of all phases" in (
        plans.describe(make(A10G), Hyperparameters())
    )
    smaller = make(A10G).with_smaller_memory_plan()
    assert smaller is not None
    assert smaller.phases != make(A10G).phases


def test_a_phase_that_does_not_fit_is_reported_with_what_lowers_it() -> None:
    peaks = [PhasePeak(phase=name, bytes=n * GIB) for name, n in (("encoding", 9), ("training", 8))]
    card = replace(T4, memory_bytes=6 * GIB)
    assert plan_warnings.memory_warnings(
        card, peaks, 1
    ) == (  # no memory plan changes the peak of encoding
        "The run is expected to take 9.00 GiB of memory in encoding, and Tesla T4 has 5.20 GiB to "
        "give: lower batch_size or resolution.",
    )
    assert plan_warnings.memory_warnings(replace(card, memory_bytes=10 * GIB), peaks, 1) == ()
    assert plan_warnings.memory_warnings(card, (), 1) == ()
    (told,) = make(replace(T4, memory_bytes=12 * GIB), memory_plan="fp32_adamw").warnings
    assert "take 13.24 GiB of memory in training" in told
    assert told.endswith("lower batch_size or resolution, or choose a smaller memory_plan.")


def test_the_plan_names_what_runs_where_a_switch_is_set_by_hand() -> None:
    eight_bit = plans.describe(make(use_8bit_adam=True), Hyperparameters(use_8bit_adam=True))
    assert "8-bit AdamW" in eight_bit
    assert "memory plan      8bit_adamw;" in eight_bit
    assert "fp32_adamw" not in eight_bit
    made = make(use_8bit_adam=False, gradient_checkpointing=True)
    assert made.memory_plan == "fp32_adamw with gradient_checkpointing=True"
    text = plans.describe(make(memory_plan="fp32_adamw_in_backward"), Hyperparameters())
    assert "memory plan      fp32_adamw_in_backward, gradients freed as they arrive: every" in text
    assert "fp32 weights, AdamW, gradient checkpointing" in text


def test_what_is_set_by_hand_stands() -> None:
    assert make(CPU, use_8bit_adam=True).use_8bit_adam
    assert make(CPU, gradient_checkpointing=True).gradient_checkpointing
    assert not make(replace(T4, memory_bytes=6 * GIB), use_8bit_adam=False).use_8bit_adam
    plan = make(CPU, memory_plan="8bit_adamw_checkpointing")
    assert plan.use_8bit_adam
    assert plan.gradient_checkpointing


def test_warm_up_defaults_and_warnings() -> None:
    assert make(lr_scheduler="linear").lr_warmup_steps == 0
    assert make(lr_scheduler="constant_with_warmup").lr_warmup_steps == 16
    assert make(lr_scheduler="cosine", lr_warmup_steps=7).lr_warmup_steps == 7
    assert "has no effect" in make(lr_warmup_steps=7).warnings[0]
    assert "never reaches" in make(lr_scheduler="linear", lr_warmup_steps=500).warnings[0]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("asked", [True, False])
def test_a_score_that_one_picture_cannot_have_is_announced(count: int, asked: bool) -> None:
    settings = Hyperparameters(compute_fid=asked)
    said = plans.make(settings, dataset(count), None, CPU).warnings
    assert any("no fid_score will be printed" in each for each in said) is (asked and count < 2)


@pytest.mark.parametrize("asked", [True, False])
def test_the_scores_are_planned_and_need_a_class_prompt(asked: bool) -> None:
    settings = Hyperparameters(compute_scores=asked)
    for prompt in ("a photo of a cat", None):
        plan = plans.make(settings, replace(dataset(3), class_prompt=prompt), None, CPU)
        said = any("compute_scores needs a class_prompt" in each for each in plan.warnings)
        assert said is (asked and prompt is None)
        rows = dict(plans.rows(plan, settings))
        assert ("8 pictures of 50 steps" in rows.get("scores", "")) is asked


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, None),
        ({"keep_last_checkpoint": True}, "at the end"),
        ({"checkpointing_steps": 5}, "every 5 steps"),
        ({"checkpointing_steps": 5, "keep_last_checkpoint": True}, "every 5 steps and at the end"),
        ({"checkpointing_minutes": 0.5, "keep_last_checkpoint": True}, "every 0.5 minutes and at"),
    ],
)
def test_the_plan_says_when_checkpoints_are_written(
    settings: dict[str, object], text: str | None
) -> None:
    plan = make(**settings)
    described = plans.describe(plan, Hyperparameters(**settings))  # type: ignore[arg-type]
    assert (f"checkpoints      {text}" in described) if text else ("  checkpoints" not in described)
    assert (plan.disk.checkpoints > 0) is bool(settings)


def test_a_checkpoint_folder_alone_saves_by_time() -> None:
    settings = Hyperparameters()
    plan = plans.make(settings, dataset(), None, CPU, has_checkpoint_dir=True)
    assert plan.checkpointing_minutes == plans.CHECKPOINT_MINUTES
    assert make().checkpointing_minutes is None


def test_without_a_model_at_hand_the_plan_says_what_is_not_known_yet() -> None:
    settings = Hyperparameters()
    plan = plans.make(settings, dataset(), None, CPU)
    text = plans.describe(plan, settings)
    assert "known once the model is unpacked" in text
    assert "the model's own" in text


def test_the_description_names_all_that_was_decided() -> None:
    settings = Hyperparameters(batch_size=2, checkpointing_steps=50, lr_scheduler="linear")
    text = plans.describe(plans.make(settings, dataset(), FULL_SIZE, T4), settings)
    for part in ("80 (20 epochs", "batch 2 x 1", "512 x 512", "Tesla T4", "fp16 with loss scaling"):
        assert part in text
    for part in ("linear", "GiB", "50 steps"):
        assert part in text


@pytest.mark.parametrize(("device", "processes"), [(T4, 1), (CPU, 2), (T4, 2)])
def test_the_description_names_nccls_buffers_where_there_are_some(
    device: DeviceFacts, processes: int
) -> None:
    settings = Hyperparameters()
    plan = plans.make(settings, dataset(), FULL_SIZE, device, processes=processes)
    shown = "0.70 GiB of NCCL's buffers beside it" in plans.describe(plan, settings)
    assert shown is (device is T4 and processes == 2)


def test_the_fast_step_is_taken_where_it_can_be_and_else_one_line_says_why() -> None:
    big = replace(A10G, memory_bytes=80 * GIB)
    plan = make(big, fast_step=True)
    assert (plan.fast_step, plan.warnings) == (True, ())
    text = plans.describe(plan, Hyperparameters(fast_step=True))
    assert "bf16, half weights beside fp32 weights, AdamW, replayed as a CUDA graph" in text
    assert not make(big).fast_step
    small = replace(A10G, memory_bytes=8 * GIB)
    processes = plans.make(Hyperparameters(fast_step=True), dataset(), None, big, processes=2)
    for left_out, why in (
        (make(CPU, fast_step=True), "there is no CUDA graph on CPU"),
        (make(small, fast_step=True), "it does not go with 8bit_adamw_in_backward"),
        (processes, "this job has 2 processes"),
    ):
        assert not left_out.fast_step
        assert left_out.warnings == (f"fast_step is left out: {why}.",)


def test_a_smaller_plan_keeps_the_fast_step_while_it_goes_with_it() -> None:
    plan: plans.TrainingPlan | None = make(replace(A10G, memory_bytes=80 * GIB), fast_step=True)
    found = []
    while plan is not None:
        found.append((plan.memory_plan, plan.fast_step))
        plan = plan.with_smaller_memory_plan()
    assert found == [
        *(("fp32_adamw", True), ("8bit_adamw", True)),
        *(("8bit_adamw_checkpointing", False), ("8bit_adamw_in_backward", False)),
    ]
