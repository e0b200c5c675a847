"""Run one training job, from its arguments and environment to its exit code.

This is the composition root: it builds the objects and passes them on. The heavy half, `fine_tune`,
is imported only once it is needed.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dreambooth.data import dataset_info
from dreambooth.data.dataset_info import DatasetInfo
from dreambooth.errors import ResourceError, UserError, quoted
from dreambooth.evaluation import vision_model
from dreambooth.job import outputs
from dreambooth.model_folder import facts as model_facts
from dreambooth.model_folder import layout
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

# Variables that torchrun and accelerate launch set for each process, beside WORLD_SIZE.
_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Variables with the number of processes: of torchrun and accelerate launch, then of MPI.
_PROCESS_COUNT_VARIABLES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_LAUNCH = "start the job with torchrun or accelerate launch, or unset {} to train in one process"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything that is known about a job before anything heavy is loaded."""

    environment: container.Environment
    environ: Mapping[str, str]
    hyperparameters: Hyperparameters
    dataset: DatasetInfo
    source: model_source.ModelSource
    warnings: tuple[str, ...]
    processes: int
    is_main_process: bool
    started: float  # by time.monotonic


def run_job(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run one training job and return its exit code.

    0: done. 1: an error, whose message is on stderr and in the failure file. 143, 130: stopped by
    SIGTERM, SIGINT; 129: by SIGHUP, which a closing terminal sends, unless it was ignored (nohup).
    """
    with logs.fault_tolerant_streams():
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
    )
    for warning in dataset.warnings:
        log.warning(warning)
    source = model_source.locate(settings.pretrained_model, environment.model_channel)
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
        processes=_processes(environ),
        is_main_process=environ.get("RANK", "0") == "0",
        started=started,
    )


def _process_count_variable(environ: Mapping[str, str]) -> str | None:
    """Return the variable in which a launcher gives the number of processes, None without one."""
    return next((name for name in _PROCESS_COUNT_VARIABLES if environ.get(name)), None)


def _processes(environ: Mapping[str, str]) -> int:
    """Return how many processes train together. Raises UserError."""
    name = _process_count_variable(environ)
    text = environ[name] if name else "1"
    if not re.fullmatch("[0-9]{1,6}", text) or int(text) < 1:
        raise UserError(
            f"The variable {name} is {quoted(text)}, and must be the number of processes that "
            f"train together: {_LAUNCH.format(name)}."
        )
    return int(text)


def _refuse_a_lone_process(job: Job) -> None:
    """Raise UserError where several processes should train but cannot find each other."""
    missing = [name for name in _LAUNCHER_VARIABLES if not job.environ.get(name)]
    if job.processes > 1 and missing:
        name = _process_count_variable(job.environ)
        raise UserError(
            f"{name} says that {job.processes} processes train together, and {missing[0]} is not "
            f"set: {_LAUNCH.format(name)}."
        )


def _refuse_other_group_size(job: Job, processes: int) -> None:
    """Raise UserError where the group's size differs from what the launcher announced.

    Otherwise each process would train on its own and write to the same folders as the others.
    """
    if processes != job.processes:
        raise UserError(
            f"{job.processes} process(es) should train together, and this one is in a group of "
            f"{processes}: {_LAUNCH.format(_process_count_variable(job.environ) or 'WORLD_SIZE')}."
        )


def _print_plan(job: Job, plan: TrainingPlan) -> None:
    if not job.is_main_process:
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
    unpacked = folder if job.source.kind == "archive" else None
    copied_parts = [folder / part for part in layout.OPTIONAL_PARTS] if folder else []
    return plans.make(
        job.hyperparameters,
        job.dataset,
        facts,
        device,
        has_checkpoint_dir=job.environment.checkpoint_dir is not None,
        processes=job.processes,
        base_bytes=outputs.size([unpacked]) if unpacked else 0,
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
    _refuse_a_lone_process(job)
    outputs.make(job.environment)
    with temporary_folder.temporary() as temporary:
        if job.source.kind == "archive" and job.source.path is not None:
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
        from accelerate import Accelerator

        from dreambooth.job import fine_tune
        from dreambooth.job.task import Task

        stop.check()  # an import may have swallowed the exception of a stop signal
        # The training loop sets the precision, whatever an accelerate configuration says.
        accelerator = Accelerator(mixed_precision="no", cpu=device.kind == "cpu")
        _refuse_other_group_size(job, accelerator.num_processes)
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
