"""Run one training job, from its arguments and environment to its exit code.

This is the composition root: it builds the objects and passes them on. The heavy half, `fine_tune`,
is imported only once it is needed.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from dreambooth.data import dataset_info
from dreambooth.data.dataset_info import DatasetInfo
from dreambooth.errors import ResourceError
from dreambooth.evaluation import vision_model
from dreambooth.job import launcher, outputs
from dreambooth.model_folder import facts as model_facts
from dreambooth.model_folder import layout, single_file
from dreambooth.model_folder import source as model_source
from dreambooth.process import failure, gpu_driver, logs, temporary_folder
from dreambooth.process.stop import Stopped, StopSignals
from dreambooth.settings import container, hyperparameters
from dreambooth.settings.hyperparameters import Hyperparameters
from dreambooth.training import device as devices
from dreambooth.training import host_allocator
from dreambooth.training import plan as plans
from dreambooth.training.plan import TrainingPlan

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything that is known about a job before anything heavy is loaded."""

    environment: container.Environment
    environ: Mapping[str, str]
    hyperparameters: Hyperparameters
    dataset: DatasetInfo
    source: model_source.ModelSource
    warnings: tuple[str, ...]
    launch: launcher.Launch
    started: float  # by time.monotonic


def run_job(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run one training job and return its exit code.

    0: done. 1: an error, whose message is on stderr and in the failure file. 143, 130: stopped by
    SIGTERM, SIGINT; 129: by SIGHUP, which a closing terminal sends, unless it was ignored (nohup).
    """
    with logs.fault_tolerant_streams("stdout", "stderr"):
        return _run(argv, environ)


def _run(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    started = time.monotonic()
    failure_file = container.failure_file(environ)
    stop = StopSignals()
    previous_excepthook = threading.excepthook
    threading.excepthook = _log_thread_failure
    try:
        with stop.listening():
            environment = container.read(argv, environ)
            logs.to_stderr(environment.log_level, phase="starting")
            if environment.dry_run:
                _dry_run(_prepare(environment, environ, started))
            else:
                _train(_prepare(environment, environ, started), stop)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return stopped.exit_code
    except Exception as error:  # the job's end: every error becomes its exit code
        known = failure.for_the_user(error)
        failure.write_failure(failure_file, known or error)
        if known is None:
            print(logs.trace_of(error), file=sys.stderr)
        else:
            print(f"error: {known}", file=sys.stderr)
        return 1
    finally:
        threading.excepthook = previous_excepthook
    return 0


def _log_thread_failure(failed: threading.ExceptHookArgs) -> None:
    """Log in one line that a library's thread has failed.

    One example is the thread that writes TensorBoard events, when the disk is full.
    """
    log.warning("a background thread ended: %s", failed.exc_value)


def _prepare(environment: container.Environment, environ: Mapping[str, str], started: float) -> Job:
    """Read settings and data, and find the model; one error lists all wrong settings."""
    parsed = hyperparameters.parse(environment.settings)
    warnings = (*environment.warnings, *parsed.warnings)
    for warning in warnings:
        log.warning(warning)
    # The training toolkit, which runs the entry point of source_dir, sets SM_MODULE_DIR.
    if "sagemaker_submit_directory" in environment.settings and "SM_MODULE_DIR" not in environ:
        log.info("source_dir and entry_point are not used: this image runs its own code")
    settings = parsed.hyperparameters
    dataset = dataset_info.read(
        environment.training,
        class_data_dir=settings.class_data_dir,
        with_prior_preservation=settings.with_prior_preservation,
        needs_class_images=settings.trains_on_class_images,
        given=environment.ways_in.training,
    )
    for warning in dataset.warnings:
        log.warning(warning)
    source = model_source.locate(
        settings.pretrained_model,
        environment.model_channel,
        given=environment.ways_in.model,
        prediction_type=settings.prediction_type,
        base=settings.base,
    )
    outputs.check(environment, source.path)
    if settings.compute_fid and settings.fid_features:
        vision_model.read(settings.fid_features)
    return Job(
        environment=environment,
        environ=environ,
        hyperparameters=settings,
        dataset=dataset,
        source=source,
        warnings=warnings,
        launch=launcher.read(environ),
        started=started,
    )


def _print_plan(job: Job, plan: TrainingPlan) -> None:
    if not job.launch.is_main_process:
        return
    print(plans.describe(plan, job.hyperparameters), flush=True)
    sizes = dataset_info.size_warnings(job.dataset, plan.resolution) if plan.resolution else ()
    for warning in (*plan.warnings, *sizes):
        log.warning(warning)


def _make_training_plan(
    job: Job,
    facts: model_facts.ModelFacts | None,
    device: devices.DeviceFacts,
    folder: Path | None = None,
) -> TrainingPlan:
    """Make the training plan. folder: the model's folder, None if it is not there yet."""
    made = folder if job.source.kind in ("archive", "single_file") else None
    if job.source.kind == "single_file":
        made = folder or job.source.path  # the folder takes as much
    copied_parts = [folder / part for part in layout.OPTIONAL_PARTS] if folder else []
    if job.hyperparameters.export_single_file and folder is not None:
        single_file.structure_of(folder)  # a model without one is refused before it is trained
    return plans.make(
        job.hyperparameters,
        job.dataset,
        facts,
        device,
        has_checkpoint_dir=job.environment.checkpoint_dir is not None,
        processes=job.launch.processes,
        base_bytes=outputs.size([made]) if made else 0,
        copied_bytes=outputs.size(copied_parts),
    )


def _dry_run(job: Job) -> None:
    if job.source.kind == "hub":
        log.warning(
            "there is no folder or file %s here: it would be fetched from the hub",
            job.source.location,
        )
    folder = job.source.path if job.source.kind == "folder" else None
    plan = _make_training_plan(job, model_source.peek(job.source), devices.from_driver(), folder)
    _print_plan(job, plan)
    try:
        outputs.check_room(job.environment, plan)
    except ResourceError as error:  # the run itself may be meant for another machine
        log.warning(error)


def _train(job: Job, stop: StopSignals) -> None:
    launcher.refuse_a_lone_process(job.launch, job.environ)
    # The other processes and hosts of a job share its folders.
    leads = job.launch.is_main_process and job.environment.is_first_host
    lock = outputs.locked(job.environment, job.hyperparameters) if leads else nullcontext()
    with lock, temporary_folder.temporary() as temporary:
        outputs.make(job.environment)
        if leads:
            outputs.report_unused_checkpoints(job.environment, job.hyperparameters)
        if job.source.kind in ("archive", "single_file") and job.source.path is not None:
            outputs.check_room_to_unpack(job.source.path, temporary)
        folder = model_source.open_source(job.source, temporary)
        stop.check()
        import torch  # from here on the job is heavy

        device = devices.from_torch(torch)
        if device.kind == "cpu":
            host_allocator.keep_freed_memory()
            gpu_driver.refuse_cpu(
                job.environ,
                gpu_driver.inspect_machine(),
                torch_version=torch.__version__,
                cuda_version=torch.version.cuda,
            )
        plan = _make_training_plan(job, model_facts.read_facts(folder), device, folder)
        _print_plan(job, plan)
        outputs.check_room(job.environment, plan)
        from dreambooth.job import fine_tune
        from dreambooth.job.task import Task

        stop.check()  # an import may have swallowed the exception of a stop signal
        accelerator = launcher.join(job.launch, on_cpu=device.kind == "cpu")
        task = Task(
            environment=job.environment,
            hyperparameters=job.hyperparameters,
            dataset=job.dataset,
            plan=plan,
            model_folder=folder,
            base_name=job.source.location,
            device=accelerator.device,
            warnings=job.warnings,
            started=job.started,
        )
        fine_tune.run(task, accelerator, stop)
