"""The composition root of training: environment in, exit code out.

Builds the objects and hands them down; the heavy half is `fine_tune`, imported when it is due.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from dreambooth import container, failure, hyperparameters, logs, outputs
from dreambooth.data import dataset_info
from dreambooth.data.dataset_info import DatasetInfo
from dreambooth.diffusion import facts as model_facts
from dreambooth.diffusion import source as model_source
from dreambooth.errors import DreamBoothError
from dreambooth.hyperparameters import Hyperparameters
from dreambooth.training import device as devices
from dreambooth.training import plan as plans
from dreambooth.training.plan import TrainingPlan

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything that is known before anything heavy is loaded."""

    environment: container.Environment
    hyperparameters: Hyperparameters
    dataset: DatasetInfo
    source: model_source.ModelSource
    warnings: tuple[str, ...]
    processes: int
    is_main_process: bool


def run(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run one training job; returns its exit code.

    0 done, 1 error (its sentence on stderr and in the failure file), 143 and 130 where SIGTERM or
    SIGINT stopped it.
    """
    failure_file = container.failure_file(environ)
    _mend_streams()
    try:
        environment = container.read(argv, environ)
        logs.to_stderr(environment.log_level)
        with _signals_stop():
            if environment.dry_run:
                _dry_run(_prepare(environment, environ))
            else:
                _train(_prepare(environment, environ))
    except DreamBoothError as error:
        print(f"error: {error}", file=sys.stderr)
        failure.write_failure(failure_file, error)
        return 1
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        return 130
    except _Terminated:
        print("stopped by SIGTERM", file=sys.stderr)
        return 143
    except Exception as error:
        traceback.print_exc()
        failure.write_failure(failure_file, error)
        return 1
    return 0


def _mend_streams() -> None:
    """A job that was started with a stream closed runs all the same."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


class _Terminated(BaseException):
    """SIGTERM arrived."""


@contextmanager
def _signals_stop() -> Iterator[None]:
    """SIGTERM unwinds the stack like SIGINT does, so that temporary folders are removed."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    try:
        previous = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread: the caller's handlers stand
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _prepare(environment: container.Environment, environ: Mapping[str, str]) -> Job:
    """Read settings and data and find the model; all wrong settings are told at once."""
    parsed = hyperparameters.parse(environment.settings)
    for warning in parsed.warnings:
        log.warning(warning)
    settings = parsed.hyperparameters
    dataset = dataset_info.read(
        environment.training,
        class_data_dir=settings.class_data_dir,
        with_prior_preservation=settings.with_prior_preservation,
        needs_class_images=settings.prior_preservation_mode == "images",
    )
    for warning in dataset.warnings:
        log.warning(warning)
    source = model_source.locate(settings.pretrained_model, environment.model_channel)
    outputs.check(environment, source.path)
    return Job(
        environment=environment,
        hyperparameters=settings,
        dataset=dataset,
        source=source,
        warnings=parsed.warnings,
        processes=int(environ.get("WORLD_SIZE") or 1),  # set by torchrun and accelerate launch
        is_main_process=environ.get("RANK", "0") == "0",
    )


def _print_plan(job: Job, plan: TrainingPlan) -> None:
    if not job.is_main_process:
        return
    try:
        print(plans.describe(plan, job.hyperparameters), flush=True)
    except OSError:  # nobody reads (a closed pipe), or a full disk: no reason not to train
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sizes = dataset_info.size_warnings(job.dataset, plan.resolution) if plan.resolution else ()
    for warning in (*plan.warnings, *sizes):
        log.warning(warning)


def _plan(
    job: Job, facts: model_facts.ModelFacts | None, device: devices.DeviceFacts
) -> TrainingPlan:
    return plans.make(
        job.hyperparameters,
        job.dataset,
        facts,
        device,
        has_checkpoint_dir=job.environment.checkpoint_dir is not None,
        processes=job.processes,
    )


def _dry_run(job: Job) -> None:
    if job.source.kind == "hub":
        log.warning(
            "there is no folder or file %s here: it would be fetched from the hub",
            job.source.location,
        )
    _print_plan(job, _plan(job, model_source.peek(job.source), devices.from_driver()))


def _train(job: Job) -> None:
    outputs.make(job.environment)
    workspace = Path(tempfile.mkdtemp(prefix="dreambooth-"))
    try:
        folder = model_source.open_source(job.source, workspace)
        import torch  # from here on the job is heavy

        plan = _plan(job, model_facts.read_facts(folder), devices.from_torch(torch))
        _print_plan(job, plan)
        from accelerate import Accelerator

        from dreambooth import fine_tune
        from dreambooth.task import Task

        # Precision is the loop's business, whatever an accelerate configuration says.
        accelerator = Accelerator(mixed_precision="no")
        task = Task(
            environment=job.environment,
            hyperparameters=job.hyperparameters,
            dataset=job.dataset,
            plan=plan,
            model_folder=folder,
            base_name=job.source.location,
            device=accelerator.device,
            warnings=job.warnings,
        )
        fine_tune.run(task, accelerator)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
