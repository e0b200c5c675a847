"""Read the meter while a job trains, and say at the end what it has seen.

A reading that fails is not worth the training: the meter then stops, with one warning.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from dreambooth.data.cache import LatentPosteriors
from dreambooth.diffusion import model as models
from dreambooth.diffusion.model import DiffusionModel
from dreambooth.errors import ResourceError
from dreambooth.job import outputs
from dreambooth.job.kept_states import KeptStates
from dreambooth.job.previews import failure_reason
from dreambooth.job.run_report import RunReport
from dreambooth.job.task import Task
from dreambooth.training import loop, meter_budget
from dreambooth.training import meter as meters
from dreambooth.training.early_stopping import decision, fault
from dreambooth.training.meter import CLASS, EMPTY, INSTANCE, OTHER_CLASS, Meter, MeterReading
from dreambooth.training.state import TrainingState

log = logging.getLogger(__name__)


def prompts(task: Task) -> dict[str, tuple[str, ...]]:
    """Return the prompts that the meter reads, one for each picture, by name.

    The other class is a dog, or a cat where a subject is a dog. Where a subject has no class_prompt
    the class is left out. A run without a meter has none.
    """
    if interval(task) is None:
        return {}
    pictures, subjects = len(task.dataset.instance_images), task.dataset.subjects
    found = {
        INSTANCE: task.dataset.prompts,
        OTHER_CLASS: (meter_budget.prompts(task.dataset)["other_class"],) * pictures,
        EMPTY: ("",) * pictures,
    }
    of_classes = [each.class_prompt or "" for each in subjects for _ in each.instance_images]
    return found | ({CLASS: tuple(of_classes)} if all(of_classes) else {})


def interval(task: Task) -> int | None:
    """Return after how many steps the meter is read; None in a run without one."""
    if not task.hyperparameters.meter:
        return None
    return meters.reading_interval(task.plan, task.hyperparameters)


@dataclass(slots=True, kw_only=True)
class Metering:
    """The meter of a job, None where it has none or could not be read, and its early stopping.

    kept: where states are kept, None where none is.
    """

    state: TrainingState
    run_report: RunReport
    meter: Meter | None = None
    kept: KeptStates | None = None
    _looked_at: int = 0

    def read(self, step: int) -> MeterReading | None:
        """Return a reading if one is due after this step, and log it."""
        if self.meter is None or step != self.state.step:
            return None  # steps that are yielded together share the newest weights
        before, self._looked_at = max(self._looked_at, self._read_until()), step
        if not self.meter.is_due(step, before):
            return None
        try:
            with self.run_report.phase("meter"):
                reading = self.meter.read(step, self.state.readings)
        except Exception as error:  # a reading is not worth failing the job
            log.warning("the meter stops: %s", failure_reason(error))
            self.meter = None
            return None
        if not _is_finite(reading):  # the loop says so itself if training has diverged
            return None
        self.state.readings.append(reading)
        log.info("%s", sentence(reading))
        is_kept = not self._ends_early or fault(reading, self.state.readings[:-1]) is None
        if self.kept is not None and is_kept:
            try:
                with self.run_report.phase("states"):
                    self.kept.save(self.state)
            except ResourceError as error:  # the states before it stay
                log.warning("%s", error)
        return reading

    def is_enough(self) -> bool:
        """Return whether early stopping ends the training here."""
        return self._ends_early and decision(self.state.readings) is not None

    @property
    def _ends_early(self) -> bool:
        return self.kept is not None and self.run_report.task.hyperparameters.early_stopping

    def choose(self) -> str | None:
        """Give the model the weights that early stopping has chosen, and return in words why.

        Return None where all steps were made; without early stopping the log says what it would
        have done.
        """
        ended, steps = decision(self.state.readings), self.run_report.task.plan.steps
        if ended is None:
            return None
        if self.kept is None or not self._ends_early:
            log.info("early_stopping would have %s", ended.sentence(steps))
            return None
        why = ended.sentence(steps)
        if ended.kept is not None:
            if self.kept.load(self.state, ended.kept):
                self.state.step = ended.kept
            else:
                why = f"{why}, which is gone: the last weights are taken instead"
        log.info("%s", why)
        return f"{why[0].upper()}{why[1:]}."

    def _read_until(self) -> int:
        return self.state.readings[-1].step if self.state.readings else 0

    def finish(self) -> None:
        """Log what the meter has cost, and where training has moved the model most."""
        if self.meter is None or not self.state.readings:
            return
        seconds = dict(self.run_report.timings.phases())
        whole = seconds["meter"] + seconds["training"]
        log.info(
            "the meter took %.1f s, %.1f %% of training; at the end %s",
            seconds["meter"],
            100 * seconds["meter"] / max(whole, 1e-9),
            where_it_moved(self.state.readings[-1]),
        )


def start(
    task: Task,
    model: DiffusionModel,
    state: TrainingState,
    instance: LatentPosteriors,
    text: Mapping[str, torch.Tensor],
    run_report: RunReport,
) -> Metering:
    """Return the metering of a job, whose model must still be the base model.

    Of several processes only the one that writes the report reads it; the others wait for it where
    they next average their gradients.
    text: prompt -> encoder_hidden_states [1,L,D] as far as prompts are encoded already; the others
    are encoded at each reading, because the text encoder is trained.
    """
    metering = Metering(state=state, run_report=run_report)
    every = interval(task)
    if every is None and run_report.writes:
        asked = {
            "early_stopping": task.hyperparameters.early_stopping,
            "keep_states": task.hyperparameters.keeps_states_to_choose,
        }
        for name, is_asked in asked.items():
            if is_asked:
                log.warning("%s: a run of %d steps is too short for it", name, task.plan.steps)
    if every is None or not run_report.writes:
        return metering

    def encode(prompt: str) -> torch.Tensor:
        if prompt in text:
            return text[prompt]
        return models.encode_text(model, models.tokenize(model, [prompt]))

    meter = Meter(
        instance,
        latent_scale=float(model.vae.config.scaling_factor),
        noise_scheduler=models.training_noise_scheduler(model),
        seed=task.hyperparameters.seed,
        prompts=prompts(task),
        encode_text=_in_eval_mode(state, encode),
        predict=functools.partial(_predict, task, state),
        interval=every,
        steps=task.plan.steps,
    )
    try:
        with run_report.phase("meter"):
            meter.start()
    except Exception as error:  # as in Metering.read
        log.warning("there is no meter: %s", failure_reason(error))
        return metering
    metering.meter = meter
    if task.hyperparameters.states_kept:
        metering.kept = KeptStates(
            folder=outputs.states_folder(task.environment, task.plan),
            keep=task.hyperparameters.states_kept,
            elsewhere=task.environment.ways_in.elsewhere("output_data_dir"),
        )
    return metering


def sentence(reading: MeterReading) -> str:
    """Return a reading in words."""
    drifts = ", ".join(
        f"{name.replace('_', ' ')} {drift:.3f}" for name, drift in reading.drifts.items()
    )
    return (
        f"loss at fixed noise {reading.loss:.3f} of the base's; drift {drifts} of the subject's; "
        f"guidance multiplies {reading.guidance:.2f} times the base's"
    )


def where_it_moved(reading: MeterReading) -> str:
    """Return in words at which timesteps the loss fell most and least, and which prompts moved."""
    low, high = (choose(reading.losses) for choose in (min, max))
    most, least = reading.losses.index(low), reading.losses.index(high)
    moved = max(reading.drifts.items(), key=lambda one: one[1])
    return (
        f"the loss on the instance pictures fell most at {_timesteps(most)} (to {low:.3f} of the "
        f"base's) and least at {_timesteps(least)} ({high:.3f}), and of the prompts beside the "
        f"subject's the {moved[0].replace('_', ' ')} moved most, {moved[1]:.3f} of what the "
        "subject's did"
    )


def _timesteps(number: int) -> str:
    quarters = ("the first", "the second", "the third", "the last")
    return f"{quarters[number]} quarter of the timesteps"


def _is_finite(reading: MeterReading) -> bool:
    values = reading.figures().values()
    return all(math.isfinite(value) for value in values)


@contextmanager
def _eval_mode(*modules: nn.Module | None) -> Iterator[None]:
    """Switch dropout off, which would draw from training's random generator."""
    training = [module for module in modules if module is not None and module.training]
    for module in training:
        module.eval()
    try:
        yield
    finally:
        for module in training:
            module.train()


def _in_eval_mode(
    state: TrainingState, encode: Callable[[str], torch.Tensor]
) -> Callable[[str], torch.Tensor]:
    def encode_text(prompt: str) -> torch.Tensor:
        with _eval_mode(state.text_encoder), state.precision.autocast():
            return encode(prompt)

    return encode_text


@torch.no_grad()
def _predict(
    task: Task,
    state: TrainingState,
    noisy_latents: torch.Tensor,
    timesteps: torch.Tensor,
    text: torch.Tensor,
) -> torch.Tensor:
    """Return model_pred [R,C,h,w] in fp32, of as many rows at a time as a micro-batch has.

    Without half copies of the weights this takes less memory than a step: gradients are freed by
    then, except in the fast step, and no activation is kept.
    """
    rows = 1 if task.plan.fast_step else task.plan.batch_size
    found = []
    with _eval_mode(state.unet), state.precision.autocast(keeps_copies=False):
        for first in range(0, len(timesteps), rows):
            some = slice(first, first + rows)
            latents, those = (one[some].to(task.device) for one in (noisy_latents, timesteps))
            found.append(loop.predict(state.unet, latents, those, text[some]).float())
    return torch.cat(found)
