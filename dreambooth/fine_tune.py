"""The heavy half of a job, in its order of work: class images, caches, training, export.

The order keeps memory low: the class-image sampler is gone before the training model is loaded, and
the VAE and the text encoder have left the device before the first step.
"""

from __future__ import annotations

import copy
import gc
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from dreambooth import class_sampling, export, fid, hyperparameter_text, recorder
from dreambooth.data import cache, fingerprint
from dreambooth.diffusion import model as models
from dreambooth.diffusion.model import DiffusionModel
from dreambooth.errors import ResourceError
from dreambooth.previews import Previews
from dreambooth.progress import Progress
from dreambooth.recorder import Recorder
from dreambooth.task import Task
from dreambooth.training import loop, optimizer
from dreambooth.training import state as states
from dreambooth.training.plan import TrainingPlan
from dreambooth.training.precision import Precision
from dreambooth.training.report import Report

log = logging.getLogger(__name__)

Text = dict[str, torch.Tensor]


def run(task: Task, accelerator: Accelerator) -> None:
    """Train, write the model folder and the report of the run.

    Raises DreamBoothError; running out of GPU memory is a ResourceError.
    """
    torch.manual_seed(task.hyperparameters.seed)  # for what libraries draw; our own draws are keyed
    if task.hyperparameters.deterministic:
        _ask_for_determinism()
    if accelerator.is_main_process:
        export.clear(task.environment.model_dir, base_folder=task.model_folder)
    try:
        with Recorder(task=task, writes=accelerator.is_main_process) as record:
            with accelerator.main_process_first(), record.timings.phase("class images"):
                # The main process samples, the others find all there.
                record.class_paths = class_sampling.class_image_paths(task)
            _fine_tune(task, record, accelerator)
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"The GPU ran out of memory (memory_plan {task.plan.memory_plan}): lower batch_size or "
            "resolution, or set memory_plan to 8bit_adamw_checkpointing."
        ) from error


def _ask_for_determinism() -> None:
    # cuBLAS reads its variable when its first handle is made; nothing has run on the device yet.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def _fine_tune(task: Task, record: Recorder, accelerator: Accelerator) -> None:
    """Load, cache, train, export."""
    settings, plan, phase = task.hyperparameters, task.plan, record.timings.phase
    with phase("loading the model"):
        model = models.load(task.model_folder, device=task.device)
    noise_scheduler = models.training_noise_scheduler(model)
    with phase("encoding"):
        data, text = _cache(task, model, record.class_paths)
    prior_unet = None
    if settings.with_prior_preservation and not task.samples_class_images:
        prior_unet = copy.deepcopy(model.unet)
    _leave_the_device(model, text_encoder=not settings.train_text_encoder)

    state = _training_state(task, model)
    identity = task.identity()
    checkpoints = _checkpoint_folder(task)
    if checkpoints is not None:
        _resume(state, checkpoints, identity, settings.resume, accelerator)

    previews = Previews(task=task, model=model, precision=state.precision, text=text)

    def draw_sample() -> Image.Image | None:
        with phase("sample pictures"):
            return previews.sample()

    steps = loop.train(
        state,
        data,
        plan,
        settings,
        noise_scheduler=noise_scheduler,
        encode_text=lambda ids: models.text_features(model, ids),
        prior_unet=prior_unet,
        accelerator=accelerator,
    )
    if not accelerator.is_main_process:  # `accelerate launch`: one process reports and writes
        for _ in steps:
            pass
        return
    _follow(task, record, state, steps, draw_sample, checkpoints, identity)
    state.optimizer.state.clear()  # its memory is free for the last pictures
    record.final = draw_sample()
    if settings.compute_fid:
        with phase("fid_score"):
            fid.log_score(task, model, previews)
    with phase("export"):
        _export(task, state, record.final)


def _follow(
    task: Task,
    record: Recorder,
    state: states.TrainingState,
    steps: Iterator[loop.StepMetrics],
    draw_sample: Callable[[], Image.Image | None],
    checkpoints: Path | None,
    identity: Mapping[str, str],
) -> None:
    """Run the loop to its end, reporting each step and saving checkpoints when they are due."""
    settings, phase = task.hyperparameters, record.timings.phase
    report = Report(
        task.environment.output_data_dir,
        task.plan,
        first_step=state.step,
        stream=sys.stderr,
        sample_steps=settings.sample_steps,
        draw_sample=draw_sample,
    )
    saved_at = time.monotonic()
    with report, phase("training"):
        for metrics in steps:
            report.step(metrics)
            if checkpoints is not None and _checkpoint_due(task.plan, state.step, saved_at):
                keep = settings.checkpoints_total_limit
                with phase("checkpoints"):
                    states.save(state, checkpoints, identity=identity, keep=keep)
                saved_at = time.monotonic()
    report.finish(state.loss_total / state.step)
    if state.skipped_steps:
        log.info("%d fp16 steps overflowed and were tried again", state.skipped_steps)


def _cache(
    task: Task, model: DiffusionModel, class_paths: Sequence[Path]
) -> tuple[loop.TrainingData, Text]:
    """Encode all pictures and prompts once; the second value is the text of sample pictures."""
    settings, dataset = task.hyperparameters, task.dataset
    total = len(dataset.instance_images) + len(class_paths)

    def posteriors(stream: str, paths: Sequence[Path], done: int) -> cache.LatentPosteriors:
        return cache.build(
            paths,
            resolution=task.resolution,
            center_crop=settings.center_crop,
            crops=task.plan.cached_crops,
            seed=settings.seed,
            stream=stream,
            encode_image=lambda pixels: models.encode_posterior(model, pixels),
            on_image=lambda count: progress.update(done + count),
        ).to(task.device)

    def text(prompt: str) -> torch.Tensor:
        return models.encode_text(model, models.tokenize(model, [prompt]))

    def train_text(prompt: str) -> torch.Tensor:
        if settings.train_text_encoder:  # its output changes with every step
            return models.tokenize(model, [prompt]).to(task.device)
        return text(prompt)

    with Progress(total, "encoding", stream=sys.stderr, unit="pictures") as progress:
        first = len(dataset.instance_images)
        instance = posteriors("instance", dataset.instance_images, 0)
        class_ = posteriors("class", class_paths, first) if class_paths else None
    class_prompt = dataset.class_prompt if settings.with_prior_preservation else None
    data = loop.TrainingData(
        instance=instance,
        class_=class_,
        instance_text=train_text(dataset.instance_prompt),
        class_text=train_text(class_prompt) if class_prompt is not None else None,
        latent_scale=float(model.vae.config.scaling_factor),
        prior_text=text(class_prompt) if class_prompt is not None else None,
    )
    if settings.train_text_encoder:
        return data, {}
    return data, {prompt: text(prompt) for prompt in _sampled_prompts(task)}


def _sampled_prompts(task: Task) -> tuple[str, ...]:
    """What pictures are drawn with, and the empty negative prompt."""
    return (task.sample_prompt, task.dataset.instance_prompt, "")


def _leave_the_device(model: DiffusionModel, *, text_encoder: bool) -> None:
    """From here on only what is trained stays there."""
    model.vae.to("cpu")
    if text_encoder:
        model.text_encoder.to("cpu")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _training_state(task: Task, model: DiffusionModel) -> states.TrainingState:
    """The parts that are trained, in training mode, with their optimizer."""
    settings, plan = task.hyperparameters, task.plan
    trained: list[nn.Module] = [model.unet]
    if settings.train_text_encoder:
        trained.append(model.text_encoder)
    for module in trained:
        module.requires_grad_(True)
        module.train()
    if plan.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
        if settings.train_text_encoder:
            model.text_encoder.gradient_checkpointing_enable()
    return states.TrainingState(
        unet=model.unet,
        text_encoder=model.text_encoder if settings.train_text_encoder else None,
        optimizer=optimizer.build(trained, settings, use_8bit_adam=plan.use_8bit_adam),
        precision=Precision(plan.mixed_precision, task.device),
    )


def _resume(
    state: states.TrainingState,
    checkpoints: Path,
    identity: Mapping[str, str],
    resume: str,
    accelerator: Accelerator,
) -> None:
    if resume == "auto":
        if states.load_newest(state, checkpoints, identity=identity):
            log.info("resumed at step %d from %s", state.step, checkpoints)
    elif accelerator.is_main_process:
        states.clear(checkpoints)


def _checkpoint_folder(task: Task) -> Path | None:
    """The folder given for checkpoints; where only an interval is set, one beside the metrics."""
    if task.environment.checkpoint_dir is not None:
        return task.environment.checkpoint_dir
    if task.plan.checkpointing_steps or task.plan.checkpointing_minutes:
        return task.environment.output_data_dir / "checkpoints"
    return None


def _checkpoint_due(plan: TrainingPlan, step: int, saved_at: float) -> bool:
    if plan.checkpointing_steps is not None and step % plan.checkpointing_steps == 0:
        return True
    minutes = plan.checkpointing_minutes
    return minutes is not None and time.monotonic() - saved_at >= 60 * minutes


def _export(task: Task, state: states.TrainingState, sample: Image.Image | None) -> None:
    dataset, settings = task.dataset, task.hyperparameters
    with_class = settings.with_prior_preservation
    card = export.ModelCard(
        base=task.base_name,
        instance_prompt=dataset.instance_prompt,
        class_prompt=dataset.class_prompt if with_class else None,
        steps=state.step,
        planned_steps=task.plan.steps,
        instance_images=len(dataset.instance_images),
        class_images=task.plan.class_images,
        train_text_encoder=settings.train_text_encoder,
        data_fingerprint=fingerprint.of_dataset(dataset),
        licence=export.licence_of(task.model_folder),
        versions=recorder.versions(),
    )
    export.write(
        task.environment.model_dir,
        base_folder=task.model_folder,
        trained=export.TrainedParts(unet=state.unet, text_encoder=state.text_encoder),
        resolution=task.resolution,
        card=card,
        hyperparameters_json=hyperparameter_text.as_json(settings),
        samples={task.sample_prompt: sample} if sample is not None else {},
        precision="fp16" if settings.export_precision == "fp16" else "fp32",
    )
    log.info("the model is in %s", task.environment.model_dir)
