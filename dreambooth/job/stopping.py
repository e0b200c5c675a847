"""Write what a job leaves: the model of its last step, or what is left of a stopped training.

SageMaker sends SIGKILL 120 s after SIGTERM, and a disk may write no more than 125 MB/s. At full
size a checkpoint (10.4 GB) then takes 83 s and a model (5.2 GB) 41 s, so there may be no time for
both. What is written after a stop:

* after the last step: the whole model (a stop during the export lets it finish, but no second
  copy in one file is begun);
* with a checkpoint folder: the checkpoint, from which the next start resumes; then also the model
  of the steps so far, if the remaining time is enough at the last measured speed;
* without one: the model of the steps so far, marked as partial in its card.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from PIL import Image

from dreambooth.data import fingerprint
from dreambooth.job import outputs, run_report
from dreambooth.job.checkpoints import Checkpoints
from dreambooth.job.task import Task
from dreambooth.limits import LIMITS
from dreambooth.model_folder import export, single_file_export
from dreambooth.model_folder.taught_subjects import TaughtSubject
from dreambooth.process.stop import StopSignals
from dreambooth.settings import hyperparameter_text
from dreambooth.training.state import TrainingState

log = logging.getLogger(__name__)

ASSUMED_BYTES_PER_SECOND = 125e6  # of a disk that has not been measured yet
MARGIN = 1.5  # an export also reads and casts; a checkpoint is only written


def after_stop(
    task: Task, state: TrainingState, checkpoints: Checkpoints, stop: StopSignals
) -> str | None:
    """Write what the module's docstring says for a stop, and return a sentence about it.

    Return None where no step was made. Raises ResourceError where a file cannot be written.
    """
    if state.step == 0:
        return None
    done = f"The run was stopped after step {state.step} of {task.plan.steps}"
    left = "the model"
    if state.step < task.plan.steps:
        left = "a partial model"
        if checkpoints.folder is not None:
            if not checkpoints.holds(state):
                checkpoints.save(state)
            speed = checkpoints.bytes_per_second or ASSUMED_BYTES_PER_SECOND
            if MARGIN * task.plan.disk.model / speed > stop.seconds_left():
                log.info("%s; no time is left for a partial model", done)
                return f"{done}; it goes on from its checkpoint."
    write_model(task, state)
    return f"{done}; {left} is in the model folder."


def write_model(task: Task, state: TrainingState, *, ended_early: str | None = None) -> None:
    """Write the model of the steps so far into the model folder.

    ended_early: the sentence of early stopping, for the model's card.
    """
    export.write(
        task.environment.model_dir,
        base_folder=task.model_folder,
        trained=export.TrainedParts(unet=state.unet, text_encoder=state.text_encoder),
        resolution=task.resolution,
        card=_card(task, state, ended_early),
        hyperparameters_json=hyperparameter_text.as_json(task.hyperparameters),
        precision="fp16" if task.hyperparameters.export_precision == "fp16" else "fp32",
        elsewhere=task.environment.ways_in.elsewhere("model_dir"),
    )
    log.info(
        "the model of step %d of %d is in %s",
        state.step,
        task.plan.steps,
        task.environment.model_dir,
    )


def write_single_file(task: Task, stop: StopSignals) -> None:
    """Write the model in the model folder as one file, too, if it is asked for and time is left."""
    if not task.hyperparameters.export_single_file or stop.asked:
        return
    out = outputs.single_file(task.environment)
    out.unlink(missing_ok=True)  # of an earlier run
    title = ", ".join(subject.instance_prompt for subject in task.dataset.subjects)
    single_file_export.export(task.environment.model_dir, out, title=title)


def add_samples(
    task: Task,
    state: TrainingState,
    samples: Mapping[str, Image.Image],
    *,
    ended_early: str | None = None,
) -> None:
    """Add the sample pictures, if there are any, to the model folder. Raises ResourceError."""
    if not samples:
        return
    export.add_samples(
        task.environment.model_dir,
        card=_card(task, state, ended_early),
        samples=samples,
        elsewhere=task.environment.ways_in.elsewhere("model_dir"),
    )


def _card(task: Task, state: TrainingState, ended_early: str | None) -> export.ModelCard:
    dataset, settings = task.dataset, task.hyperparameters
    with_class = settings.with_prior_preservation
    return export.ModelCard(
        base=task.base_name,
        subjects=[
            TaughtSubject(
                instance_prompt=subject.instance_prompt,
                class_prompt=subject.class_prompt if with_class else None,
            )
            for subject in dataset.subjects
        ]
        + [*task.plan.kept_subjects][: LIMITS.max_subjects - len(dataset.subjects)],
        steps=state.step,
        planned_steps=task.plan.steps,
        instance_images=len(dataset.instance_images),
        class_images=task.plan.class_images,
        train_text_encoder=settings.train_text_encoder,
        data_fingerprint=fingerprint.of_dataset(dataset),
        licence=export.licence_of(task.model_folder),
        ended_early=ended_early,
        versions=run_report.versions(),
    )
