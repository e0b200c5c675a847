"""Draw the meter's pictures, the same prompts from one seed at moments of a run, and score them.

They are drawn at the end, at the start and where the meter's readings turn, as far as
`meter_pictures_share` allows (`training.meter_budget`), as the server draws by default. No fault in
them may cost the training or its model; a stop signal interrupts them.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dreambooth.data.seeds import derive_seed
from dreambooth.diffusion.model import DiffusionModel
from dreambooth.errors import ResourceError
from dreambooth.evaluation.features import Picture
from dreambooth.job import scoring
from dreambooth.job.previews import Previews, failure_reason
from dreambooth.job.run_report import RunReport
from dreambooth.job.task import Task
from dreambooth.process import files
from dreambooth.report import report_data
from dreambooth.runs import run_folder
from dreambooth.training import meter_budget
from dreambooth.training import plan as plans
from dreambooth.training.state import TrainingState
from dreambooth.training.turns import turn, turns

log = logging.getLogger(__name__)

PHASE = "meter pictures"


def prompts(task: Task) -> dict[str, str]:
    """Return the prompts of the meter's pictures by name; none in a run without such pictures."""
    if not plans.meter_moments(task.plan, task.hyperparameters):
        return {}
    return meter_budget.prompts(task.dataset)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeterPictures:
    """The meter's pictures of one job, in `meter/` beside the metrics.

    Pictures that are there already are those of an earlier part of the run, and stay. drawing:
    returns the context of a phase in which pictures are drawn.
    """

    task: Task
    state: TrainingState
    run_report: RunReport
    previews: Previews
    drawing: Callable[[str], AbstractContextManager[None]]

    @property
    def _folder(self) -> Path:
        return self.task.environment.output_data_dir / run_folder.METER

    @property
    def _moments(self) -> int:
        return plans.meter_moments(self.task.plan, self.task.hyperparameters)

    def begin(self) -> None:
        """Draw with the base model; in a resumed run, what a stop signal has interrupted."""
        settings, plan = self.task.hyperparameters, self.task.plan
        if not self._moments and settings.meter and settings.meter_pictures_share:
            share = meter_budget.share_of_a_moment(
                settings, steps=plan.steps, prompts=plan.meter_prompts, memory_plan=plan
            )
            log.info(
                "the meter draws no pictures: %d of them take %.2f of this run's work, more than "
                "meter_pictures_share=%g",
                *(plan.meter_prompts, share, settings.meter_pictures_share),
            )
        if self.state.step == 0 and self._moments > 1:
            self._draw()
        elif self.state.readings and self.state.readings[-1].step == self.state.step:
            self.after_reading()

    def after_reading(self) -> None:
        """Draw if something turns at the last reading, unless earlier turns took all moments."""
        readings, between = self.state.readings, self._moments - 2
        if between <= 0 or self.state.step == self.task.plan.steps:
            return
        reason = turn(readings)
        if reason is not None and turns(readings[:-1]) < between:
            log.info("the meter's pictures of step %d: %s", self.state.step, reason)
            self._draw()

    def end(self) -> None:
        """Draw with the weights that the written model has, also where pictures are there."""
        if self._moments:
            self._draw(anew=True)

    def score(self, model: DiffusionModel, give_back_the_base: Callable[[], None]) -> None:
        """Score all moments into `meter/scores.json`, and log what the pictures have cost.

        give_back_the_base: as in `scoring.print_scores`.
        """
        if not self._moments:
            return
        with self.drawing(PHASE):
            try:
                scores = self._scores(model, give_back_the_base)
                self._write(report_data.METER_SCORES, json.dumps(scores, indent=2).encode())
            except Exception as error:  # a score is not worth failing the job
                log.warning("the meter's pictures have no scores: %s", failure_reason(error))
        seconds = dict(self.run_report.timings.phases())
        log.info(
            "the meter's pictures took %.1f s, %.1f %% of the training's %.1f s",
            seconds[PHASE],
            100 * seconds[PHASE] / max(seconds["training"], 1e-9),
            seconds["training"],
        )

    def _draw(self, *, anew: bool = False) -> None:
        """Draw what is missing of the state's step, or all of it anew."""
        names = {name: f"step-{self.state.step:06d}-{name}.png" for name in prompts(self.task)}
        wanted = {
            name: prompt
            for name, prompt in prompts(self.task).items()
            if anew or not (self._folder / names[name]).is_file()
        }
        if not wanted:
            return
        with self.drawing(PHASE):
            drawn = self.previews.pictures(
                wanted.values(),
                seed=derive_seed(self.task.hyperparameters.seed, "meter picture"),
                num_inference_steps=plans.SCORED_STEPS,
                what="picture of the meter",
            )
            for name, prompt in wanted.items():
                try:
                    if prompt in drawn:
                        self._write(names[name], _png(drawn[prompt]))
                    elif anew:  # what an earlier part of the run drew shows another model
                        (self._folder / names[name]).unlink(missing_ok=True)
                except (OSError, ResourceError) as error:
                    log.warning("no picture of the meter: %s", error)

    def _write(self, name: str, content: bytes) -> None:
        """Write a file of `meter/` wholly or not at all. Raises ResourceError."""
        elsewhere = self.task.environment.ways_in.elsewhere("output_data_dir")
        with files.disk_faults_named("A picture of the meter", self._folder, elsewhere=elsewhere):
            self._folder.mkdir(parents=True, exist_ok=True)
            files.write_whole(self._folder / name, content)

    def _scores(
        self, model: DiffusionModel, give_back_the_base: Callable[[], None]
    ) -> Mapping[int, Mapping[str, float]]:
        """Return the scores of each step that has all pictures, and log them."""
        asked = prompts(self.task)
        drawn: dict[int, dict[str, Picture]] = {}
        for one in report_data.meter_pictures(self._folder):
            if one.name in asked:
                with Image.open(one.path) as picture:
                    pixels = np.array(picture.convert("RGB"))
                drawn.setdefault(one.step, {})[asked[one.name]] = pixels
        whole = {step: row for step, row in drawn.items() if row.keys() == set(asked.values())}
        if not whole:
            return {}
        give_back_the_base()
        found = scoring.scores_over_steps(self.task, model, whole)
        for step, scores in found.items():
            log.info("the meter's pictures of step %d: %s", step, report_data.in_words(scores))
        return found


def _png(picture: Image.Image) -> bytes:
    content = io.BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()
