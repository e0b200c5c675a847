"""What a job hands over: the model of its last step, or what a stop in training leaves.

SageMaker kills 120 s after SIGTERM, and a disk may write no more than 125 MB/s: at full size a
checkpoint (10.4 GB) takes 83 s and a model (5.2 GB) 41 s, which is too much for both. The rule:

* all steps made: the model, whole (a stop during the export lets it finish);
* a checkpoint folder: the checkpoint, for the next start goes on from it; then the model of the
  steps so far as well, where it fits into the time that is left at the speed just seen;
* none: the model of the steps so far, marked as partial in its card.
"""

from __future__ import annotations

import logging

from PIL import Image

from dreambooth.data import fingerprint
from dreambooth.job import run_report
from dreambooth.job.checkpoints import Checkpoints
from dreambooth.job.task import Task
from dreambooth.model_folder import export
from dreambooth.process.stop import StopSignals
from dreambooth.settings import hyperparameter_text
from dreambooth.training.state import TrainingState

log = logging.getLogger(__name__)

ASSUMED_BYTES_PER_SECOND = 125e6  # of a disk that has not been measured yet
MARGIN = 1.5  # a model is read, cast and written; a checkpoint was only written


def after_stop(
    task: Task, state: TrainingState, checkpoints: Checkpoints, stop: StopSignals
) -> str | None:
    """Write what the rule asks for; returns a sentence on it, None where no step was made.

    Raises ResourceError where it cannot be written.
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


def write_model(task: Task, state: TrainingState) -> None:
    """Write the model folder of the steps so far."""
    export.write(
        task.environment.model_dir,
        base_folder=task.model_folder,
        trained=export.TrainedParts(unet=state.unet, text_encoder=state.text_encoder),
        resolution=task.resolution,
        card=_card(task, state),
        hyperparameters_json=hyperparameter_text.as_json(task.hyperparameters),
        precision="fp16" if task.hyperparameters.export_precision == "fp16" else "fp32",
    )
    log.info(
        "the model of step %d of %d is in %s",
        state.step,
        task.plan.steps,
        task.environment.model_dir,
    )


def add_sample(task: Task, state: TrainingState, sample: Image.Image | None) -> None:
    """Add the sample picture, where there is one, to the model folder. Raises ResourceError."""
    if sample is None:
        return
    export.add_samples(
        task.environment.model_dir,
        card=_card(task, state),
        samples={task.sample_prompt: sample},
    )


def _card(task: Task, state: TrainingState) -> export.ModelCard:
    dataset, settings = task.dataset, task.hyperparameters
    with_class = settings.with_prior_preservation
    return export.ModelCard(
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
        versions=run_report.versions(),
    )
