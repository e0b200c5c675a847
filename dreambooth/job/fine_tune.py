"""Run the heavy half of a job: class images, encoding, training, export, last pictures.

The order keeps memory low: the class-image sampler is unloaded before the training model is loaded,
and the VAE and a frozen text encoder leave the device before the first step.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace

import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from dreambooth.diffusion import device_memory, safety
from dreambooth.diffusion import model as models
from dreambooth.diffusion.model import DiffusionModel
from dreambooth.errors import ResourceError
from dreambooth.fast import captured_loop
from dreambooth.fast.cuda_graphs import CudaGraphCapturer
from dreambooth.fast.graphed_passes import without_capture
from dreambooth.job import (
    agreement,
    class_sampling,
    encoding,
    fid,
    kept_states,
    metering,
    outputs,
    scoring,
    stopping,
)
from dreambooth.job.checkpoints import Checkpoints
from dreambooth.job.meter_pictures import MeterPictures
from dreambooth.job.metering import Metering
from dreambooth.job.previews import Previews, side_by_side
from dreambooth.job.run_report import RunReport
from dreambooth.job.task import Task
from dreambooth.limits import size_in_words
from dreambooth.model_folder import export
from dreambooth.process.memory import is_out_of_memory
from dreambooth.process.stop import Stopped, StopSignals
from dreambooth.report.timings import peak_memory_bytes
from dreambooth.training import freed_gradients, loop, optimizer
from dreambooth.training import plan as plans
from dreambooth.training import state as states
from dreambooth.training.gpu_peaks import GpuPeaks
from dreambooth.training.mixed_precision import Precision
from dreambooth.training.run_log import RunLog
from dreambooth.training.step_metrics import StepMetrics

log = logging.getLogger(__name__)


def run(task: Task, accelerator: Accelerator, stop: StopSignals) -> None:
    """Train, and write the model folder and the report of the run.

    Raises DreamBoothError; running out of GPU memory in the smallest memory plan is a
    ResourceError. Raises Stopped after a stop signal; in training, after `stopping.after_stop` has
    written its files.
    """
    if accelerator.is_main_process:
        fid.check_features(task)
    torch.manual_seed(task.hyperparameters.seed)  # libraries draw from it; we derive our own seeds
    if task.hyperparameters.deterministic:
        _ask_for_determinism()
    checkpoints = _checkpoints(task)
    checkpoints.check()
    agreement.refuse_unequal_processes(accelerator, checkpoints.identity)
    # The export takes it along, so a faulty one ends the job before anything is sampled.
    safety.load(task.model_folder, device=torch.device("cpu"), dtype=torch.float32)
    if accelerator.is_main_process:
        export.check(
            task.environment.model_dir,
            base_folder=task.model_folder,
            elsewhere=task.environment.ways_in.elsewhere("model_dir"),
        )
    try:
        with RunReport(task=task, writes=accelerator.is_main_process) as run_report:
            with run_report.phase("class images"):
                run_report.class_paths = class_sampling.class_image_paths(
                    task, share=agreement.share(accelerator)
                )
            stop.check()
            _fine_tune_with_smaller_memory_plans(task, run_report, accelerator, stop, checkpoints)
        if accelerator.is_main_process:
            accelerator.wait_for_everyone()
    except Stopped:
        if run_report.others_wait:
            accelerator.wait_for_everyone()
        raise
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError(plans.out_of_memory_advice(task.plan)) from error


def _fine_tune_with_smaller_memory_plans(
    task: Task,
    run_report: RunReport,
    accelerator: Accelerator,
    stop: StopSignals,
    checkpoints: Checkpoints,
) -> None:
    """Fine-tune; when memory runs out, start again with the next smaller memory plan.

    A step that failed may have updated some weights and not others, so everything is loaded anew,
    and training goes on from the last checkpoint or from the start. One of several processes cannot
    restart alone: there, running out of memory raises ResourceError.
    """
    while True:
        try:
            return _fine_tune(task, run_report, accelerator, stop, checkpoints)
        except (RuntimeError, MemoryError, ResourceError) as error:
            if not is_out_of_memory(error):
                raise
            made = run_report.step is not None and run_report.step >= task.plan.steps
            trained = made or run_report.stopped is not None
            plan = task.plan.with_smaller_memory_plan()
            if plan is None and task.hyperparameters.keep_subjects == "auto":
                plan = task.plan.without_kept_subjects() if task.plan.kept_subjects else None
            if plan is None or trained or accelerator.num_processes > 1:
                raise ResourceError(plans.out_of_memory_advice(task.plan)) from error
        without = " without fast_step" if task.plan.fast_step and not plan.fast_step else ""
        if task.plan.kept_subjects and not plan.kept_subjects:
            without += " without keeping the base's subjects"
        log.warning(
            "memory ran out with memory_plan %s: going on with %s%s, from the last checkpoint or "
            "from the start",
            task.plan.memory_plan,
            plan.memory_plan,
            without,
        )
        task = replace(task, plan=plan)
        run_report.task, run_report.step = task, None
        _forget_training(accelerator)


def _forget_training(accelerator: Accelerator) -> None:
    """Free the memory of what the accelerator prepared and its allocators keep."""
    with device_memory.refusals_ignored():
        accelerator.free_memory()
    accelerator._models.clear()  # it empties the caches first, and may end there
    device_memory.free_caches()


def _ask_for_determinism() -> None:
    # cuBLAS reads this variable when its first handle is made; nothing has run on the device yet.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def _fine_tune(
    task: Task,
    run_report: RunReport,
    accelerator: Accelerator,
    stop: StopSignals,
    checkpoints: Checkpoints,
) -> None:
    """Load, encode, train and export; then draw and score, where a failure is only logged."""
    settings, plan, phase = task.hyperparameters, task.plan, run_report.phase
    with phase("loading the model"):
        model = models.load(task.model_folder, device=task.device)
    noise_scheduler = models.training_noise_scheduler(model)
    with phase("encoding"):
        data, text = encoding.encode(task, model, run_report.class_paths)
    _move_to_cpu(model, text_encoder=not settings.train_text_encoder)
    state = training_state(task, model)
    prior_unet = None
    if settings.predicts_the_prior or plan.kept_subjects:
        prior_unet = state.precision.frozen_copy(model.unet)
    meter = metering.start(task, model, state, data.instance, text, run_report)
    with phase("resuming"):
        checkpoints.resume(state, may_remove=accelerator.is_main_process)
        agreement.refuse_unequal_steps(accelerator, state.step)
    if accelerator.is_main_process:  # an earlier model goes when nothing can be refused any more
        kept_states.remove(outputs.states_folder(task.environment, plan), after=state.step)
        elsewhere = task.environment.ways_in.elsewhere("model_dir")
        export.clear(task.environment.model_dir, elsewhere=elsewhere)
    previews = Previews(task=task, model=model, precision=state.precision, text=text)

    @contextlib.contextmanager
    def drawing(name: str) -> Iterator[None]:
        # Of several processes the others wait for this one, so a stop waits too.
        with phase(name), nullcontext() if accelerator.num_processes > 1 else stop.released():
            yield

    def draw_samples() -> dict[str, Image.Image]:
        with drawing("sample pictures"):
            return previews.sample()

    steps = training_loop(task)(
        state,
        data,
        plan,
        settings,
        noise_scheduler=noise_scheduler,
        encode_text=lambda ids: models.text_features(model, ids),
        prior_unet=prior_unet,
        accelerator=accelerator,
    )
    with stop.held():  # from here on a stop signal waits for the end of a step, or of the export
        steps = agreement.until_stopped(steps, state, stop, accelerator, meter.is_enough)
        if not accelerator.is_main_process:  # with several processes, one reports and writes
            return agreement.follow(steps, accelerator)
        pictures = MeterPictures(
            task=task, state=state, run_report=run_report, previews=previews, drawing=drawing
        )
        run_log = _run_log(task, state, lambda: side_by_side(draw_samples()), meter, pictures)
        try:
            pictures.begin()
            _run_loop(task, run_report, state, steps, run_log, checkpoints)
            run_report.others_wait = True
            ended_early = _end_early(meter, state, run_report, checkpoints)
        except Stopped:
            run_report.others_wait = True
            with phase("stopping"):
                run_report.stopped = stopping.after_stop(task, state, checkpoints, stop)
            raise
        with phase("export"):
            stopping.write_model(task, state, ended_early=ended_early)
            with _errors_only_logged():
                stopping.write_single_file(task, stop)
        if ended_early is None:
            _save_last_checkpoint(state, run_report, checkpoints, stop)
        if not (settings.keeps_states_to_choose or plan.keep_last_checkpoint):
            kept_states.remove(outputs.states_folder(task.environment, plan))
        state.optimizer.state.clear()  # frees its memory for the last pictures,
        _forget_training(accelerator)  # and that of half-precision weights and graphs
        try:
            samples = draw_samples()
            run_report.last_sample = side_by_side(samples)
            with _errors_only_logged():
                run_log.add_last_sample(run_report.last_sample, step=state.step)
                stopping.add_samples(task, state, samples, ended_early=ended_early)
            if settings.compute_fid:
                with phase("fid_score"), stop.released():
                    run_report.fid_score = fid.print_score(task, model, previews)
            pictures.end()
            # The last of all, because they give the base's weights back, and that once.
            base_back = functools.cache(functools.partial(scoring.give_back_the_base, task, model))
            if settings.compute_scores:
                with phase("scores"), stop.released():
                    run_report.scores = scoring.print_scores(task, model, previews, base_back)
            pictures.score(model, base_back)
        except Stopped:
            sampled = run_report.last_sample is not None
            missing = "not all of its scores" if sampled else "no sample picture"
            run_report.stopped = (
                f"The {state.step} steps were made and the model is whole; it has {missing}."
            )
            raise


def _end_early(
    meter: Metering, state: states.TrainingState, run_report: RunReport, checkpoints: Checkpoints
) -> str | None:
    """Log what the meter has seen; where early stopping ended the run, take the state it chose.

    Return its sentence, None where all steps were made. A last checkpoint that is asked for is
    written first, because the chosen weights belong to no optimizer.
    """
    meter.finish()
    run_report.step = state.step  # a run that ended early before has made no step now
    wanted = checkpoints.folder is not None and checkpoints.plan.keep_last_checkpoint
    if meter.is_enough() and wanted and not checkpoints.holds(state):
        with _errors_only_logged(), run_report.phase("checkpoints"):
            checkpoints.save(state)
    run_report.stopped = meter.choose()
    if run_report.stopped is not None:
        run_report.kept_step = state.step
    return run_report.stopped


def _save_last_checkpoint(
    state: states.TrainingState, run_report: RunReport, checkpoints: Checkpoints, stop: StopSignals
) -> None:
    """Save a checkpoint of the last step if it is due; it comes after the model, which is whole."""
    if checkpoints.due(state.step) and not (checkpoints.holds(state) or stop.asked):
        with _errors_only_logged(), run_report.phase("checkpoints"):
            checkpoints.save(state)
    if not checkpoints.holds(state):
        log.info(
            "no checkpoint of the last step is kept: set keep_last_checkpoint=True for a run "
            "that may be trained further"
        )


@contextlib.contextmanager
def _errors_only_logged() -> Iterator[None]:
    """Log an error in the block instead of raising it, because the model is already written."""
    try:
        yield
    except Exception as error:  # the model is worth more than what comes after it
        log.warning("the model is whole, but not what comes after it: %s", error)
        log.debug("what went wrong after the export", exc_info=True)


def training_loop(task: Task) -> Callable[..., Iterator[StepMetrics]]:
    """Return the training loop that the training plan asks for."""
    if task.plan.fast_step:
        on_cuda = task.device.type == "cuda"
        capture = CudaGraphCapturer(task.device).capture if on_cuda else without_capture
        return functools.partial(captured_loop.train, capture=capture)
    return freed_gradients.train if task.plan.frees_gradients else loop.train


def _checkpoints(task: Task) -> Checkpoints:
    return Checkpoints(
        folder=outputs.checkpoint_folder(task.environment, task.plan),
        mode=task.hyperparameters.resume,
        identity=task.identity(),
        plan=task.plan,
        keep=task.hyperparameters.checkpoints_total_limit,
        elsewhere=task.environment.ways_in.elsewhere("checkpoint_dir"),
    )


def _run_log(
    task: Task,
    state: states.TrainingState,
    draw_sample: Callable[[], Image.Image | None],
    meter: Metering,
    pictures: MeterPictures,
) -> RunLog:
    return RunLog(
        task.environment.output_data_dir,
        task.plan,
        first_step=state.step,
        stream=sys.stderr,
        sample_steps=task.hyperparameters.sample_steps,
        draw_sample=draw_sample,
        read_meter=meter.read,
        after_reading=pictures.after_reading,
        elsewhere=task.environment.ways_in.elsewhere("output_data_dir"),
    )


def _run_loop(
    task: Task,
    run_report: RunReport,
    state: states.TrainingState,
    steps: Iterator[StepMetrics],
    run_log: RunLog,
    checkpoints: Checkpoints,
) -> None:
    """Run the loop to its end, report each step, and save checkpoints when they are due.

    The checkpoint of the last step is left for after the export, because a full disk must not cost
    the model.
    """
    try:
        with run_log, run_report.phase("training"):
            run_report.gpu_peaks.begin_training()
            for metrics in steps:
                run_report.step = metrics.step
                run_log.step(metrics)
                # Of steps that `captured_loop` yields at once, only the newest has these weights.
                is_newest = metrics.step == state.step < task.plan.steps
                if is_newest and checkpoints.due(state.step):
                    with run_report.phase("checkpoints"):
                        checkpoints.save(state)
    except Exception as error:  # after the last step the model comes first
        if state.step < task.plan.steps:
            raise
        log.warning("all steps are made, but not all of their report: %s", error)
        log.debug("what went wrong with the report", exc_info=True)
    run_log.finish(state.loss_total / state.step)
    _log_memory(task, run_report.gpu_peaks)
    if state.skipped_steps:
        log.info("%d fp16 steps overflowed and were tried again", state.skipped_steps)


def _log_memory(task: Task, peaks: GpuPeaks) -> None:
    """Log the peak memory that the training plan expected beside the measured one.

    On a GPU the peaks of training and of all phases so far are measured, on a CPU only the latter.
    """
    expected = size_in_words(task.plan.memory_bytes)
    measured = f"{size_in_words(peak_memory_bytes())} of this process"
    if task.device.type == "cuda":
        measured = peaks.in_words()
    log.info("memory: %s expected by the plan, at the peak %s", expected, measured)


def _move_to_cpu(model: DiffusionModel, *, text_encoder: bool) -> None:
    """Move the VAE to the CPU, and the text encoder where `text_encoder` is set."""
    model.vae.to("cpu")
    if text_encoder:
        model.text_encoder.to("cpu")
    device_memory.free_caches()


def training_state(task: Task, model: DiffusionModel) -> states.TrainingState:
    """Return the parts that are trained, in training mode, with their optimizer."""
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
        precision=Precision.for_plan(plan, task.device),
    )
