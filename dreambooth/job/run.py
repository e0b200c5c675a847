"""Run one training job, from its arguments and environment to its exit code.

This is the composition root: it builds the objects and passes them on. The heavy half, `fine_tune`,
is imported only once it is needed.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from dreambooth.data import dataset_info
from dreambooth.data.dataset_info import DatasetInfo
from dreambooth.errors import ResourceError
from dreambooth.evaluation import vision_model
from dreambooth.job import launcher, outputs, process_count, workers
from dreambooth.job.meeting import Meeting, Start, tell_the_first
from dreambooth.job.process_count import ProcessCount
from dreambooth.job.workers import FromParent
from dreambooth.model_folder import facts as model_facts
from dreambooth.model_folder import layout, single_file, taught_subjects
from dreambooth.model_folder import source as model_source
from dreambooth.process import (
    child_process,
    failure,
    files,
    gpu_driver,
    libraries,
    logs,
    temporary_folder,
)
from dreambooth.process.stop import Stopped, StopSignals
from dreambooth.runs import run_folder
from dreambooth.runs.record import Record
from dreambooth.runs.run_folder import Run
from dreambooth.settings import container, hyperparameters
from dreambooth.settings.container import Hosts
from dreambooth.settings.hyperparameters import Hyperparameters
from dreambooth.training import device as devices
from dreambooth.training import host_allocator
from dreambooth.training import plan as plans
from dreambooth.training.plan import TrainingPlan

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything that is known about a job before anything heavy is loaded."""

    argv: tuple[str, ...]
    environment: container.Environment
    environ: Mapping[str, str]
    hyperparameters: Hyperparameters
    dataset: DatasetInfo
    source: model_source.ModelSource
    warnings: tuple[str, ...]
    launch: launcher.Launch
    worker: FromParent | None  # of the processes that a parent of ours has started
    record: Record  # of the run's folder, where there is one
    started: float  # by time.monotonic


def run_job(argv: Sequence[str], environ: Mapping[str, str], *, is_process: bool = False) -> int:
    """Run one training job and return its exit code.

    0: done. 1: an error, whose message is on stderr and in the failure file. 143, 130: stopped by
    SIGTERM, SIGINT; 129: by SIGHUP, which a closing terminal sends, unless it was ignored (nohup).
    is_process: whether the process ends with the job, and so keeps its run locked until then.
    """
    worker = FromParent.read(environ)
    with logs.fault_tolerant_streams("stdout", "stderr"):
        if worker is None:
            return _run(argv, environ, None, is_process=is_process)
        child_process.die_with_parent(worker.parent)
        with open(os.devnull, "w") as nowhere, ExitStack() as streams:
            run_dir, _ = container.run_dir(argv, environ)
            if not worker.is_main:
                streams.enter_context(redirect_stdout(nowhere))
                streams.enter_context(redirect_stderr(nowhere))
            elif run_dir is not None:
                streams.enter_context(logs.copied_into(run_dir / run_folder.LOG))
            code = _run(argv, environ, worker)
    os._exit(code)  # every file is written: libraries that hold the group may hang in their cleanup


def _run(
    argv: Sequence[str],
    environ: Mapping[str, str],
    worker: FromParent | None,
    *,
    is_process: bool = False,
) -> int:
    started = time.monotonic()
    run_dir, is_recorded = container.run_dir(argv, environ)
    # Of several processes and hosts, the one that leads the others records the run.
    leads = worker is None and launcher.is_main_process(environ)
    is_recorded = is_recorded and leads and container.read_hosts(environ).is_first
    record = Record(run_dir if is_recorded else None, environ, is_process=is_process)
    stop = StopSignals(leave=record.leave)
    previous_excepthook = threading.excepthook
    threading.excepthook = _log_thread_failure
    code = 1
    try:
        with stop.listening(), stop.held():
            code = _prepare_and_run(argv, environ, run_dir, worker, record, started, stop)
            record.ended(code)
    except Stopped:  # the signal came when all was done, or is answered already
        pass
    finally:
        record.close()
        threading.excepthook = previous_excepthook
    return code


def _prepare_and_run(
    argv: Sequence[str],
    environ: Mapping[str, str],
    run_dir: Path | None,
    worker: FromParent | None,
    record: Record,
    started: float,
    stop: StopSignals,
) -> int:
    """Return the exit code; a stop signal interrupts all but the first and the last word."""
    failure_file = container.failure_file(environ)
    try:
        record.begin()
        with stop.released():
            saved = {}
            if run_dir is not None:
                saved = Run(run_dir).settings()
                record.settings(container.to_save(argv, environ, saved))
            environment = container.read(argv, environ, saved=saved)
            logs.to_stderr(environment.log_level, phase="starting")
            launch = launcher.read(environ)
            try:
                job = _prepare(argv, environment, environ, launch, worker, record, started)
            except Exception as error:
                if not (launch.is_group or environment.dry_run):
                    tell_the_first(environment.hosts, error)
                raise
            if environment.dry_run:
                _dry_run(job)
            elif worker is not None:
                _work(job, worker.model_folder, stop)
            else:
                _train(job, stop)
    except Stopped as stopped:
        if worker is None:
            print(stopped, file=sys.stderr)
        return stopped.exit_code
    except Exception as error:  # the job's end: every error becomes its exit code
        if worker is not None:
            worker.tell(error)
            return 1
        known = failure.for_the_user(error)
        record.failed(known or error)
        # What stands there while another job runs would be taken for that job's failure. The
        # processes beside a main one, which holds the lock, tell the failure of their own job.
        belongs = not (launcher.is_main_process(environ) and files.is_locked(failure_file.parent))
        if belongs and container.read_hosts(environ).is_first:
            failure.write_failure(failure_file, known or error)
        if known is None:
            print(logs.trace_of(error), file=sys.stderr)
        else:
            print(f"error: {known}", file=sys.stderr)
        return 1
    return 0


def _log_thread_failure(failed: threading.ExceptHookArgs) -> None:
    """Log in one line that a library's thread has failed.

    One example is the thread that writes TensorBoard events, when the disk is full.
    """
    log.warning("a background thread ended: %s", failed.exc_value)


def _prepare(
    argv: Sequence[str],
    environment: container.Environment,
    environ: Mapping[str, str],
    launch: launcher.Launch,
    worker: FromParent | None,
    record: Record,
    started: float,
) -> Job:
    """Read settings and data, and find the model; one error lists all wrong settings."""
    parsed = hyperparameters.parse(environment.settings)
    warnings = (*environment.warnings, *parsed.warnings)
    if worker is None:  # otherwise the parent has logged them
        _log_warnings(warnings)
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
        inside=environment.ways_in.inside,
    )
    if settings.masked_loss:
        dataset_info.check_masks(dataset)
    if worker is None:
        _log_warnings(dataset.warnings)
    source = model_source.locate(
        settings.pretrained_model,
        environment.model_channel,
        given=environment.ways_in.model,
        prediction_type=settings.prediction_type,
        base=settings.base,
    )
    outputs.check(environment, source.path)
    if settings.compares_features and settings.fid_features:
        vision_model.read(settings.fid_features)
    return Job(
        argv=tuple(argv),
        environment=environment,
        environ=environ,
        hyperparameters=settings,
        dataset=dataset,
        source=source,
        warnings=warnings,
        launch=launch,
        worker=worker,
        record=record,
        started=started,
    )


def _log_warnings(warnings: Iterable[str]) -> None:
    for warning in warnings:
        log.warning(warning)


def _print_plan(job: Job, plan: TrainingPlan, *warnings: str) -> str:
    """Print the training plan, in the main process alone, and return its text."""
    text = plans.describe(plan, job.hyperparameters)
    job.record.plan(plan.steps, plans.rows(plan, job.hyperparameters))
    leads = job.launch.is_main_process and (job.launch.is_group or job.environment.hosts.is_first)
    if not leads or (job.worker is not None and job.worker.shown_plan == text):
        return text
    print(text, flush=True)
    sizes = dataset_info.size_warnings(job.dataset, plan.resolution) if plan.resolution else ()
    _log_warnings((*warnings, *plan.warnings, *sizes))
    return text


def _make_training_plan(
    job: Job,
    facts: model_facts.ModelFacts | None,
    device: devices.DeviceFacts,
    folder: Path | None,
    processes: int,
) -> TrainingPlan:
    """Make the training plan. folder: the model's folder, None if it is not there yet."""
    made = folder if job.source.kind == "archive" else None
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
        processes=processes,
        base_bytes=outputs.size([made]) if made else 0,
        copied_bytes=outputs.size(copied_parts),
        taught=taught_subjects.read(folder) if folder else (),
    )


def _plan_without_torch(
    job: Job, facts: model_facts.ModelFacts | None, folder: Path | None
) -> tuple[ProcessCount, TrainingPlan]:
    """Choose the number of processes, and make the training plan from what the driver says."""
    gpus = devices.visible_gpus(job.environ)

    def make(processes: int, device: devices.DeviceFacts) -> TrainingPlan:
        return _make_training_plan(job, facts, device, folder, processes)

    if job.launch.is_group:
        count = ProcessCount(on_each_host=job.launch.processes, hosts=1)
    else:
        count = process_count.choose(job.hyperparameters, gpus, job.environment.hosts.count, make)
    return count, make(count.total, devices.in_common(gpus[: count.on_each_host]))


def _dry_run(job: Job) -> None:
    if job.source.kind == "hub":
        log.warning(
            "there is no folder or file %s here: it would be fetched from the hub",
            job.source.location,
        )
    folder = job.source.path if job.source.kind == "folder" else None
    count, plan = _plan_without_torch(job, model_source.peek(job.source), folder)
    _print_plan(job, plan, *count.warnings)
    try:
        outputs.check_room(job.environment, plan)
    except ResourceError as error:  # the run itself may be meant for another machine
        log.warning(error)


def _train(job: Job, stop: StopSignals) -> None:
    """Train in this process, or in several that it starts unless a launcher has started it."""
    launcher.refuse_a_lone_process(job.launch, job.environ)
    hosts = Hosts() if job.launch.is_group else job.environment.hosts
    # The other processes and hosts of a job share its folders.
    leads = job.launch.is_main_process and job.environment.hosts.is_first
    lock = outputs.locked(job.environment, job.hyperparameters) if leads else nullcontext()
    with lock, Meeting(hosts) as meeting, temporary_folder.temporary() as temporary:
        if hosts.is_first:
            outputs.make(job.environment)
        if leads:
            outputs.report_unused_checkpoints(job.environment, job.hyperparameters)
        if job.source.kind in ("archive", "single_file") and job.source.path is not None:
            outputs.check_room_to_unpack(job.source.path, temporary)
        folder = model_source.open_source(job.source, temporary)
        stop.check()
        if job.launch.is_group:
            return _work(job, folder, stop)
        count, plan = _plan_without_torch(job, model_facts.read_facts(folder), folder)
        if count.total == 1 and hosts.is_first:
            return _work(job, folder, stop, *count.warnings)
        shown_plan = _print_plan(job, plan, *count.warnings)
        if hosts.is_first:
            outputs.check_room(job.environment, plan)
            start = meeting.begin(count.on_each_host)
        else:
            if (found := _wait_for_the_first_host(meeting, hosts, count)) is None:
                return None
            start = found
        process_count.refuse_missing_gpus(start.on_each_host, devices.visible_gpus(job.environ))
        group = workers.Group(
            on_each_host=start.on_each_host,
            hosts=hosts.count,
            host=hosts.current,
            address=hosts.names[0] if hosts.names else "127.0.0.1",
            port=start.port,
            interface=hosts.interface,
        )
        workers.run(
            *(job.argv, job.environ, group),
            model_folder=folder,
            workspace=temporary,
            shown_plan=shown_plan,
            meeting=meeting,
            stop=stop,
        )


def _wait_for_the_first_host(meeting: Meeting, hosts: Hosts, count: ProcessCount) -> Start | None:
    """Return what the first host says to start; None after it has trained alone."""
    first, here = hosts.names[0], hosts.names[hosts.current]
    if count.total > 1:
        log.info("this is host %s; host %s writes the results", here, first)
    else:
        log.info("one process trains, on host %s: this host, %s, has nothing to do", first, here)
    return meeting.wait_for_the_first()


def _work(job: Job, folder: Path, stop: StopSignals, *warnings: str) -> None:
    """Train in this process, alone or as one of a group."""
    import torch  # from here on the job is heavy

    gpu_driver.refuse_gpu_without_kernels(torch)
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        host_allocator.keep_freed_memory()
        gpu_driver.refuse_cpu(
            job.environ,
            gpu_driver.inspect_machine(),
            torch_version=torch.__version__,
            cuda_version=torch.version.cuda,
        )
    group = None
    if job.launch.is_group:
        launcher.refuse_a_missing_gpu(job.environ, 0 if on_cpu else torch.cuda.device_count())
        group = launcher.join(job.launch, on_cpu=on_cpu)
    device = devices.from_torch(torch)
    if group is not None:  # all processes plan by the same figures
        from dreambooth.job import agreement

        device = devices.in_common(agreement.gathered(group, device))
        if job.worker is not None:
            job.worker.met_file.touch()
    plan = _make_training_plan(
        *(job, model_facts.read_facts(folder), device, folder), job.launch.processes
    )
    _print_plan(job, plan, *warnings)
    if job.launch.is_main_process:
        outputs.check_room(job.environment, plan)
    with libraries.importing():
        from dreambooth.job import fine_tune
        from dreambooth.job.task import Task

    stop.check()  # an import may have swallowed the exception of a stop signal
    accelerator = group or launcher.join(job.launch, on_cpu=on_cpu)
    task = Task(
        environment=job.environment,
        hyperparameters=job.hyperparameters,
        dataset=job.dataset,
        plan=plan,
        model_folder=folder,
        base_name=job.source.location,
        device=accelerator.device,
        warnings=(*job.warnings, *warnings),
        started=job.started,
        workspace=job.worker.workspace
        if job.worker and not job.environment.hosts.is_first
        else None,
    )
    fine_tune.run(task, accelerator, stop)
    if group is not None:
        group.end_training()
