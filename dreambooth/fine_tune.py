"""The heavy half of a job, in its order of work: class images, caches, training, export, pictures.

The order keeps memory low: the class-image sampler is gone before the training model is loaded, and
the VAE and the text encoder have left the device before the first step.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from dreambooth import class_sampling, encoding, export, fid, handover, outputs
from dreambooth.checkpoints import Checkpoints
from dreambooth.diffusion import model as models
from dreambooth.diffusion.cuda_graphs import CudaRecorder
from dreambooth.diffusion.model import DiffusionModel
from dreambooth.errors import ResourceError
from dreambooth.previews import Previews
from dreambooth.recorder import Recorder
from dreambooth.report.timings import peak_memory_bytes
from dreambooth.stop import Stopped, StopSignals
from dreambooth.task import Task
from dreambooth.training import loop, optimizer, out_of_memory
from dreambooth.training import state as states
from dreambooth.training.gpu_peaks import GpuPeaks
from dreambooth.training.graphed_passes import Record, by_calling
from dreambooth.training.precision import Precision
from dreambooth.training.readings import StepMetrics
from dreambooth.training.report import Report

log = logging.getLogger(__name__)


def run(task: Task, accelerator: Accelerator, stop: StopSignals) -> None:
    """Train, write the model folder and the report of the run.

    Raises DreamBoothError; running out of GPU memory in the smallest memory plan is a
    ResourceError. Raises Stopped after a stop signal, once what `handover.after_stop` writes is
    written.
    """
    if accelerator.is_main_process:
        fid.check_features(task)
    torch.manual_seed(task.hyperparameters.seed)  # for what libraries draw; our own draws are keyed
    if task.hyperparameters.deterministic:
        _ask_for_determinism()
    checkpoints = _checkpoints(task)
    checkpoints.check()
    if accelerator.is_main_process:
        export.clear(task.environment.model_dir, base_folder=task.model_folder)
    try:
        with Recorder(task=task, writes=accelerator.is_main_process) as record:
            with accelerator.main_process_first(), record.phase("class images"):
                # The main process samples, the others find all there.
                record.class_paths = class_sampling.class_image_paths(task)
            stop.check()
            _fine_tune_in_what_is_free(task, record, accelerator, stop, checkpoints)
    except torch.OutOfMemoryError as error:
        raise ResourceError(out_of_memory.advice(task.plan)) from error


def _fine_tune_in_what_is_free(
    task: Task,
    record: Recorder,
    accelerator: Accelerator,
    stop: StopSignals,
    checkpoints: Checkpoints,
) -> None:
    """Fine-tune; out of memory in training, again by the next smaller memory plan.

    A step that broke off may have updated some weights and not others: all is loaded anew, and goes
    on from the last checkpoint or the start. One of several processes cannot go back alone.
    """
    while True:
        try:
            return _fine_tune(task, record, accelerator, stop, checkpoints)
        except (RuntimeError, ResourceError) as error:
            if not out_of_memory.is_meant_by(error):
                raise
            trained = record.step is not None and record.step >= task.plan.steps
            plan = task.plan.in_less_memory()
            if plan is None or trained or accelerator.num_processes > 1:
                raise ResourceError(out_of_memory.advice(task.plan)) from error
        log.warning(
            "memory ran out with memory_plan %s: going on with %s%s, from the last checkpoint or "
            "from the start",
            task.plan.memory_plan,
            plan.memory_plan,
            " without fast_step" * (task.plan.fast_step and not plan.fast_step),
        )
        task = replace(task, plan=plan)
        record.task, record.step = task, None
        accelerator.free_memory()
        _empty_the_cache()


def _ask_for_determinism() -> None:
    # cuBLAS reads its variable when its first handle is made; nothing has run on the device yet.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def _fine_tune(
    task: Task,
    record: Recorder,
    accelerator: Accelerator,
    stop: StopSignals,
    checkpoints: Checkpoints,
) -> None:
    """Load, cache, train, export; then what may fail without a loss: pictures and scores."""
    settings, plan, phase = task.hyperparameters, task.plan, record.phase
    with phase("loading the model"):
        model = models.load(task.model_folder, device=task.device)
    noise_scheduler = models.training_noise_scheduler(model)
    with phase("encoding"):
        data, text = encoding.encode(task, model, record.class_paths)
    _leave_the_device(model, text_encoder=not settings.train_text_encoder)
    state = _training_state(task, model)
    prior_unet = None
    if settings.with_prior_preservation and not task.samples_class_images:
        prior_unet = state.precision.frozen_copy(model.unet)
    with phase("resuming"):
        checkpoints.resume(state, tidies=accelerator.is_main_process)
    previews = Previews(task=task, model=model, precision=state.precision, text=text)

    def draw_sample() -> Image.Image | None:
        with phase("sample pictures"):
            if accelerator.num_processes > 1:  # the others wait for this one
                return previews.sample()
            with stop.released():
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
        record=_record_on(task.device) if plan.fast_step else by_calling,
    )
    with stop.held():  # from here on a stop signal waits for the end of a step, or of the export
        steps = _until_stopped(steps, state, stop, accelerator)
        if not accelerator.is_main_process:  # `accelerate launch`: one process reports and writes
            for _ in steps:
                pass
            return
        report = _report(task, state, draw_sample)
        try:
            _follow(task, record, state, steps, report, checkpoints)
        except Stopped:
            with phase("stopping"):
                record.stopped = handover.after_stop(task, state, checkpoints, stop)
            raise
        with phase("export"):
            handover.write_model(task, state)
        if checkpoints.due(state.step) and not (checkpoints.holds(state) or stop.asked):
            with _the_model_is_written(), phase("checkpoints"):
                checkpoints.save(state)
        state.optimizer.state.clear()  # its memory is free for the last pictures,
        accelerator.free_memory()  # and that of half weights and graphs
        try:
            record.final = draw_sample()
            with _the_model_is_written():
                report.add_last_sample(record.final)
                handover.add_sample(task, state, record.final)
            if settings.compute_fid:
                with phase("fid_score"), stop.released():
                    record.fid_score = fid.print_score(task, model, previews)
        except Stopped:
            missing = "no sample picture" if record.final is None else "no fid_score"
            record.stopped = (
                f"The {state.step} steps were made and the model is whole; it has {missing}."
            )
            raise


@contextlib.contextmanager
def _the_model_is_written() -> Iterator[None]:
    """Let nothing in the block end the job, whatever it is: it has what it was started for."""
    try:
        yield
    except Exception as error:
        log.warning("the model is whole, but not what comes after it: %s", error)
        log.debug("what went wrong after the export", exc_info=True)


def _record_on(device: torch.device) -> Record:
    return CudaRecorder(device).record if device.type == "cuda" else by_calling


def _checkpoints(task: Task) -> Checkpoints:
    return Checkpoints(
        folder=outputs.checkpoint_folder(task.environment, task.plan),
        mode=task.hyperparameters.resume,
        identity=task.identity(),
        plan=task.plan,
        keep=task.hyperparameters.checkpoints_total_limit,
    )


def _until_stopped(
    steps: Iterator[StepMetrics],
    state: states.TrainingState,
    stop: StopSignals,
    accelerator: Accelerator,
) -> Iterator[StepMetrics]:
    """The steps; after one in which a stop signal came, Stopped is raised on all processes."""
    for metrics in steps:
        yield metrics
        if metrics.step < state.step:  # made already: its report is still to come
            continue
        if accelerator.num_processes > 1:
            asked = torch.tensor(float(stop.asked), device=accelerator.device)
            if accelerator.reduce(asked, "sum") > 0 and not stop.asked:
                raise Stopped(signal.SIGTERM)
        stop.check()


def _report(
    task: Task, state: states.TrainingState, draw_sample: Callable[[], Image.Image | None]
) -> Report:
    return Report(
        task.environment.output_data_dir,
        task.plan,
        first_step=state.step,
        stream=sys.stderr,
        sample_steps=task.hyperparameters.sample_steps,
        draw_sample=draw_sample,
    )


def _follow(
    task: Task,
    record: Recorder,
    state: states.TrainingState,
    steps: Iterator[StepMetrics],
    report: Report,
    checkpoints: Checkpoints,
) -> None:
    """Run the loop to its end, reporting each step and saving checkpoints when they are due.

    That of the last step is left for after the export: a full disk must not cost the model.
    """
    try:
        with report, record.phase("training"):
            record.gpu_peaks.begin_training()
            for metrics in steps:
                record.step = metrics.step
                report.step(metrics)
                is_newest = metrics.step == state.step < task.plan.steps
                if is_newest and checkpoints.due(state.step):
                    with record.phase("checkpoints"):
                        checkpoints.save(state)
    except Exception as error:  # all steps are made: whatever it is, the model comes first
        if state.step < task.plan.steps:
            raise
        log.warning("all steps are made, but not all of their report: %s", error)
        log.debug("what went wrong with the report", exc_info=True)
    report.finish(state.loss_total / state.step)
    _log_memory(task, record.gpu_peaks)
    if state.skipped_steps:
        log.info("%d fp16 steps overflowed and were tried again", state.skipped_steps)


def _log_memory(task: Task, peaks: GpuPeaks) -> None:
    """The measured peak of training beside what the plan expected, and that of all so far."""
    expected = f"{task.plan.memory_bytes / 2**30:.2f} GiB"
    measured = f"{peak_memory_bytes() / 2**30:.2f} GiB of this process"
    if task.device.type == "cuda":
        measured = peaks.in_words()
    log.info("memory: %s expected by the plan, at the peak %s", expected, measured)


def _leave_the_device(model: DiffusionModel, *, text_encoder: bool) -> None:
    """From here on only what is trained stays there."""
    model.vae.to("cpu")
    if text_encoder:
        model.text_encoder.to("cpu")
    _empty_the_cache()


def _empty_the_cache() -> None:
    """What nothing refers to goes back to the GPU."""
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
        if plan.rounds_stochastically:
            nn.Module.to(module, torch.bfloat16)  # diffusers' own `to` warns of what it is not for
        module.requires_grad_(True)
        module.train()
    if plan.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
        if settings.train_text_encoder:
            model.text_encoder.gradient_checkpointing_enable()
    return states.TrainingState(
        unet=model.unet,
        text_encoder=model.text_encoder if settings.train_text_encoder else None,
        optimizer=optimizer.build(
            trained,
            settings,
            use_8bit_adam=plan.use_8bit_adam,
            rounds_stochastically=plan.rounds_stochastically,
            fast_step=plan.fast_step,
        ),
        precision=Precision.of(plan, task.device),
    )
