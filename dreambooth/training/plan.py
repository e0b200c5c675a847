"""Derives the training plan from hyperparameters, data, model and device, before any heavy work.

Standard library only: `--dry-run` prints a plan in well under two seconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dreambooth.data.dataset_info import DatasetInfo
from dreambooth.data.picture_files import listed, printable
from dreambooth.errors import quoted
from dreambooth.limits import size_in_words
from dreambooth.model_folder.facts import ModelFacts
from dreambooth.model_folder.taught_subjects import TaughtSubject
from dreambooth.settings.hyperparameters import Hyperparameters, MemoryPlan
from dreambooth.training import (
    disk,
    expected_memory,
    lr_schedulers,
    memory_plan,
    meter_budget,
    plan_warnings,
    subjects_kept,
)
from dreambooth.training.device import DeviceFacts
from dreambooth.training.disk import DiskBudget
from dreambooth.training.expected_memory import PhasePeak
from dreambooth.training.memory_plan import MemoryChoice

_UNKNOWN = "known once the model is unpacked"
MAX_CACHED_CROPS = 8  # random crops per picture that is not square
SCORED_PICTURES = 8  # of each prompt, for compute_scores
SCORED_STEPS = meter_budget.SERVED_STEPS
CHECKPOINT_MINUTES = 10.0  # used if a checkpoint folder is given, but no interval


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedSubject:
    """One of several subjects. steps_alone: those that `epochs` asks for in a run of its own."""

    name: str
    instance_images: int
    steps_alone: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """Everything that is derived before a run: what the job will do.

    memory_bytes: expected peak of a step on the device, 0 if not known yet. disk: expected need,
    0 if not known yet. phases: expected peaks of all phases, none if not known yet. smaller: the
    memory plans to fall back to, in this order, if memory runs out. subjects: several, or none for
    a single one. class_sets: the number of class images of each distinct class prompt. captions:
    the number of instance images that have one of their own. kept_subjects: those that the base was
    taught and that are held to what it predicts. meter_prompts: how many the meter's pictures have.
    """

    device: DeviceFacts
    steps: int
    epochs: float
    steps_by_longer_set: int
    instance_images: int
    class_images: int
    class_images_to_sample: int
    batch_size: int
    gradient_accumulation_steps: int
    processes: int
    resolution: int | None
    cached_crops: int
    mixed_precision: str
    prior_generation_precision: str
    use_8bit_adam: bool
    gradient_checkpointing: bool
    memory_plan: str
    lr_warmup_steps: int
    checkpointing_steps: int | None
    checkpointing_minutes: float | None
    keep_last_checkpoint: bool
    memory_bytes: int
    disk: DiskBudget
    warnings: tuple[str, ...] = ()
    frees_gradients: bool = False
    fast_step: bool = False
    phases: tuple[PhasePeak, ...] = ()
    smaller: tuple[MemoryChoice, ...] = ()
    subjects: tuple[PlannedSubject, ...] = ()
    class_sets: tuple[int, ...] = ()
    captions: int = 0
    kept_subjects: tuple[TaughtSubject, ...] = ()
    meter_prompts: int = 0

    def epoch(self, step: int) -> float:
        """Return the number of passes over the instance images after `step` steps."""
        per_step = self.batch_size * self.gradient_accumulation_steps * self.processes
        return step * per_step / self.instance_images

    def with_smaller_memory_plan(self) -> TrainingPlan | None:
        """Return this training plan with the next smaller memory plan; None after the last."""
        if not self.smaller:
            return None
        return replace(self, **_memory_plan_fields(*self.smaller))

    def without_kept_subjects(self) -> TrainingPlan:
        """Return this training plan with nothing of the base held."""
        return replace(self, kept_subjects=())


def samples_per_step(hyperparameters: Hyperparameters, processes: int) -> int:
    """Return the number of instance images in one step."""
    return hyperparameters.batch_size * hyperparameters.gradient_accumulation_steps * processes


def count_steps(hyperparameters: Hyperparameters, images: Sequence[int], processes: int) -> int:
    """Return max_steps if set, else the steps of `epochs` passes over the pictures.

    images: how many each subject has; every one adds the steps of a run of its own.
    """
    if hyperparameters.max_steps is not None:
        return hyperparameters.max_steps
    return sum(_steps_alone(hyperparameters, count, processes) for count in images)


def _steps_alone(hyperparameters: Hyperparameters, images: int, processes: int) -> int:
    return math.ceil(hyperparameters.epochs * images / samples_per_step(hyperparameters, processes))


def make(
    hyperparameters: Hyperparameters,
    dataset: DatasetInfo,
    facts: ModelFacts | None,
    device: DeviceFacts,
    *,
    has_checkpoint_dir: bool = False,
    processes: int = 1,
    base_bytes: int = 0,
    copied_bytes: int = 0,
    taught: Sequence[TaughtSubject] = (),
) -> TrainingPlan:
    """Derive the training plan; `facts` is None if the model is not unpacked or fetched yet.

    base_bytes, copied_bytes: as in `disk.expected`. taught: the subjects that the base was taught.
    """
    of_subjects = [len(subject.instance_images) for subject in dataset.subjects]
    instances = sum(of_subjects)
    steps = count_steps(hyperparameters, of_subjects, processes)
    samples = steps * samples_per_step(hyperparameters, processes)
    subjects = tuple(
        PlannedSubject(
            name=subject.name,
            instance_images=count,
            steps_alone=_steps_alone(hyperparameters, count, processes),
        )
        for subject, count in zip(dataset.subjects, of_subjects, strict=True)
        if dataset.are_several
    )
    given_sets = dataset.class_sets if hyperparameters.trains_on_class_images else ()
    given = sum(len(each.images) for each in given_sets)
    class_sets = [max(len(each.images), hyperparameters.num_class_images) for each in given_sets]
    class_images = sum(class_sets)
    longer = [max(instances, class_images)] if not subjects else of_subjects
    mixed_precision = hyperparameters.mixed_precision or device.mixed_precision
    prior_precision = _prior_precision(hyperparameters, device)
    meter_prompts = len(meter_budget.prompts(dataset))

    def choose(*, keeps_subjects: bool) -> tuple[MemoryChoice, ...]:
        return memory_plan.choose(
            hyperparameters,
            facts,
            device,
            mixed_precision=mixed_precision,
            prior_precision=prior_precision,
            class_images_to_sample=class_images - given,
            processes=processes,
            keeps_subjects=keeps_subjects,
            steps=steps,
            meter_prompts=meter_prompts,
        )

    kept_subjects = subjects_kept.subjects_to_keep(hyperparameters, dataset, taught)
    chosen, *smaller = choose(keeps_subjects=bool(kept_subjects))
    kept_warnings: tuple[str, ...] = ()
    if hyperparameters.keep_subjects == "True" and facts is not None and not kept_subjects:
        kept_warnings = (
            "keep_subjects=True has no effect: the base was taught no subject but this run's.",
        )
    if kept_subjects and hyperparameters.keep_subjects == "auto":
        kept_warnings = plan_warnings.kept_subjects_warnings(device, chosen.phases, processes)
        if kept_warnings:
            kept_subjects = ()
            chosen, *smaller = choose(keeps_subjects=False)
    warmup = hyperparameters.lr_warmup_steps
    if warmup is None:
        warmup = lr_schedulers.default_warmup_steps(hyperparameters.lr_scheduler, steps)
    checkpointing_steps = hyperparameters.checkpointing_steps
    checkpointing_minutes = hyperparameters.checkpointing_minutes
    if has_checkpoint_dir and checkpointing_steps is None and checkpointing_minutes is None:
        checkpointing_minutes = CHECKPOINT_MINUTES
    return TrainingPlan(
        device=device,
        steps=steps,
        epochs=samples / instances,
        steps_by_longer_set=count_steps(hyperparameters, longer, processes),
        instance_images=instances,
        class_images=class_images,
        class_images_to_sample=class_images - given,
        batch_size=hyperparameters.batch_size,
        gradient_accumulation_steps=hyperparameters.gradient_accumulation_steps,
        processes=processes,
        resolution=hyperparameters.resolution or (facts.resolution if facts else None),
        # of a picture that is drawn most often: one of the subject that has the fewest
        cached_crops=max(
            1, min(MAX_CACHED_CROPS, math.ceil(samples / len(of_subjects) / min(of_subjects)))
        ),
        mixed_precision=mixed_precision,
        prior_generation_precision=prior_precision,
        **_memory_plan_fields(chosen, *smaller),
        lr_warmup_steps=warmup,
        checkpointing_steps=checkpointing_steps,
        checkpointing_minutes=checkpointing_minutes,
        keep_last_checkpoint=hyperparameters.keep_last_checkpoint,
        disk=disk.expected(
            hyperparameters,
            facts,
            class_images=class_images - given,
            use_8bit_adam=chosen.memory_plan.use_8bit_adam,
            keeps_checkpoints=bool(
                checkpointing_steps or checkpointing_minutes or hyperparameters.keep_last_checkpoint
            ),
            base_bytes=base_bytes,
            copied_bytes=copied_bytes,
            meter_pictures=meter_prompts
            * meter_budget.moments(
                hyperparameters,
                steps=steps,
                prompts=meter_prompts,
                memory_plan=chosen.memory_plan,
            ),
        ),
        warnings=(
            *kept_warnings,
            *(facts.warnings if facts and hyperparameters.resolution is None else ()),
            *plan_warnings.memory_warnings(device, chosen.phases, processes),
            *plan_warnings.settings_warnings(
                *(hyperparameters, device, mixed_precision, steps, warmup, instances),
                has_class_prompt=all(each.class_prompt is not None for each in dataset.subjects),
            ),
            *plan_warnings.fast_step_warnings(
                hyperparameters, device, mixed_precision, processes, chosen
            ),
        ),
        subjects=subjects,
        class_sets=tuple(class_sets),
        captions=sum(
            caption is not None for subject in dataset.subjects for caption in subject.captions
        ),
        kept_subjects=kept_subjects,
        meter_prompts=meter_prompts,
    )


def meter_moments(plan: TrainingPlan, hyperparameters: Hyperparameters) -> int:
    """Return at how many moments the meter draws its pictures, as `meter_budget.moments` does."""
    return meter_budget.moments(
        hyperparameters, steps=plan.steps, prompts=plan.meter_prompts, memory_plan=plan
    )


def _memory_plan_fields(chosen: MemoryChoice, *smaller: MemoryChoice) -> dict[str, Any]:
    """Return the fields of a TrainingPlan that depend on its memory plan."""
    return {
        "memory_plan": chosen.name,
        "use_8bit_adam": chosen.memory_plan.use_8bit_adam,
        "gradient_checkpointing": chosen.memory_plan.gradient_checkpointing,
        "frees_gradients": chosen.memory_plan.frees_gradients,
        "fast_step": chosen.fast_step,
        "memory_bytes": chosen.expected_bytes,
        "phases": chosen.phases,
        "smaller": smaller,
    }


def _prior_precision(hyperparameters: Hyperparameters, device: DeviceFacts) -> str:
    wanted = hyperparameters.prior_generation_precision or device.mixed_precision
    return "no" if wanted == "fp32" else wanted


def describe(plan: TrainingPlan, hyperparameters: Hyperparameters) -> str:
    """Return the training plan as the lines that the job prints first."""
    lines = (f"  {name:<16} {text}" for name, text in rows(plan, hyperparameters))
    return "\n".join(["Plan", *lines])


def rows(plan: TrainingPlan, hyperparameters: Hyperparameters) -> list[tuple[str, str]]:
    """Return the decisions of the training plan as (name, text)."""
    curve = lr_schedulers.sketch(
        hyperparameters.lr_scheduler,
        steps=plan.steps,
        warmup_steps=plan.lr_warmup_steps,
        learning_rate=hyperparameters.learning_rate,
    )
    lines = [
        ("steps", _steps_line(plan, hyperparameters)),
        ("pictures", _pictures_line(plan)),
        (
            "resolution",
            f"{plan.resolution} x {plan.resolution}" if plan.resolution else "the model's own",
        ),
        ("device", plan.device.name),
        ("precision", _precision_line(plan)),
        ("learning rate", curve),
        ("memory plan", _memory_line(plan)),
        ("expected memory", _expected_line(plan)),
        ("expected disk", _disk_line(plan.disk)),
    ]
    if plan.kept_subjects:
        lines.insert(2, ("kept subjects", _kept_line(plan, hyperparameters)))
    when = ["at the end"] if plan.keep_last_checkpoint else []
    if plan.checkpointing_steps:
        when.insert(0, f"every {plan.checkpointing_steps} steps")
    elif plan.checkpointing_minutes:
        when.insert(0, f"every {plan.checkpointing_minutes:g} minutes")
    if when:
        lines.append(("checkpoints", " and ".join(when)))
    if moments := meter_moments(plan, hyperparameters):
        where = ("at the end", "at the start and the end")[moments > 1]
        turns = f", and where readings turn (at most {moments - 2})" if moments > 2 else ""
        lines.append(("meter pictures", f"{plan.meter_prompts} {where}{turns}"))
    if hyperparameters.compute_scores:
        lines.append(
            (
                "scores",
                f"at the end, from {SCORED_PICTURES} pictures of {SCORED_STEPS} steps with each of "
                "two prompts, by the model and by its base",
            )
        )
    return lines


def _steps_line(plan: TrainingPlan, hyperparameters: Hyperparameters) -> str:
    line = f"{plan.steps} ({plan.epochs:g} epochs of {plan.instance_images} instance images"
    if plan.subjects:
        line = f"{plan.steps} ({_sum_of_subjects(plan, hyperparameters)}"
    if plan.batch_size * plan.gradient_accumulation_steps > 1:
        line += f", batch {plan.batch_size} x {plan.gradient_accumulation_steps} accumulated"
    if plan.processes > 1:
        per_step = plan.batch_size * plan.gradient_accumulation_steps * plan.processes
        line += f", {plan.processes} processes: global batch {per_step}"
    line += ")"
    if hyperparameters.max_steps is None and plan.steps_by_longer_set != plan.steps:
        line += (
            f"; epochs are counted over the instance images: JumpStart would count the "
            f"{plan.class_images} class images and train {plan.steps_by_longer_set} steps"
        )
    return line


def _sum_of_subjects(plan: TrainingPlan, hyperparameters: Hyperparameters) -> str:
    """Return how the steps of several subjects come about, and what each gets of them."""
    share = f"each of the {len(plan.subjects)} subjects gets the same number of samples"
    if hyperparameters.max_steps is not None:
        return f"as max_steps asks; {share}"
    parts = " + ".join(f"{one.steps_alone} of {printable(one.name)}" for one in plan.subjects)
    return (
        f"{parts}, which is {hyperparameters.epochs} epochs of each subject's instance images; "
        f"{share}"
    )


def _pictures_line(plan: TrainingPlan) -> str:
    line = f"{plan.instance_images} instance images"
    if plan.subjects:
        parts = ", ".join(
            f"{one.instance_images} of {printable(one.name)}" for one in plan.subjects
        )
        line += f" ({parts})"
    if plan.captions:
        line += f", {plan.captions} with captions of their own"
    if plan.class_images:
        count = len(plan.class_sets)
        sets = f" in {count} sets, one of each class prompt" if count > 1 else ""
        line += f", {plan.class_images} class images{sets}"
        line += f" ({plan.class_images_to_sample} to sample)"
    return line + f"; cached crops of each that is not square: at most {plan.cached_crops}"


def _kept_line(plan: TrainingPlan, hyperparameters: Hyperparameters) -> str:
    """Return whom the run keeps, and how much longer a step takes for it."""
    names = listed([quoted(each.instance_prompt) for each in plan.kept_subjects])
    # Passes of a micro-batch: a backward one counts as two forward ones.
    passes = 3 * (2 if hyperparameters.with_prior_preservation else 1)
    if hyperparameters.predicts_the_prior:
        passes += 1 if hyperparameters.training_guidance_scale == 1 else 2
    return (
        f"{names}, by the base's own prediction; a step takes about {(passes + 4) / passes:.1f} "
        "times as long for it (keep_subjects)"
    )


def _precision_line(plan: TrainingPlan) -> str:
    name = {"no": "fp32", "fp16": "fp16 with loss scaling", "bf16": "bf16"}[plan.mixed_precision]
    if plan.mixed_precision == "no" and plan.device.has_tf32:
        name += " (convolutions in TF32, torch's default)"
    weights = "half weights beside fp32" if plan.fast_step else "fp32"
    line = f"{name}, {weights} weights, " + ("8-bit AdamW" if plan.use_8bit_adam else "AdamW")
    line += ", replayed as a CUDA graph" if plan.fast_step else ""
    return line + (", gradient checkpointing" if plan.gradient_checkpointing else "")


def _memory_line(plan: TrainingPlan) -> str:
    line = plan.memory_plan
    if plan.frees_gradients:
        line += ", gradients freed as they arrive: every pass is made twice"
    if plan.smaller:
        line += f"; should memory run out, {plan.smaller[0].name}"
    return line


def _expected_line(plan: TrainingPlan) -> str:
    """Return the expected memory of a step, and that of the phase that takes the most."""
    most = expected_memory.largest(plan.phases)
    if most is None:
        return _UNKNOWN
    line = f"{size_in_words(plan.memory_bytes)} in training"
    if most.bytes > plan.memory_bytes:
        line += f"; the most, {size_in_words(most.bytes)}, in {most.phase}"
    else:
        line += ", the most of all phases"
    nccl = memory_plan.nccl_bytes(plan.device, plan.processes)
    return line + (f"; {size_in_words(nccl)} of NCCL's buffers beside it" if nccl else "")


def _disk_line(budget: DiskBudget) -> str:
    parts = [
        ("the model", budget.model),
        ("one file of it", budget.single_file),
        (f"{budget.checkpoints} checkpoints at a time", budget.all_checkpoints),
        ("states to choose from", budget.states),
        ("the unpacked base", budget.base),
        ("class images", budget.class_images),
        ("the rest", budget.rest),
    ]
    named = ", ".join(f"{name} {size_in_words(count)}" for name, count in parts if count)
    return f"{size_in_words(budget.total)}: {named}" if budget.model else _UNKNOWN


def out_of_memory_advice(plan: TrainingPlan) -> str:
    """Return the sentence for a user whose job ended because the GPU ran out of memory."""
    running = MemoryPlan(
        plan.use_8bit_adam,
        plan.gradient_checkpointing,
        frees_gradients=plan.frees_gradients,
    )
    smaller = list(memory_plan.smaller_than(running))
    by_plan = f", or set memory_plan to {' or '.join(smaller)}" if smaller else ""
    return (
        f"The GPU ran out of memory (memory_plan {plan.memory_plan}): lower batch_size or "
        f"resolution{by_plan}."
    )
