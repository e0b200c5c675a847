"""Print the shares that tuners read: subject learned, class kept, pictures clean (compute_scores).

The model draws first; then the base's weights take the place of the trained ones, so that the
device never holds a second U-Net.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Mapping, Sequence

import torch

from dreambooth.data.seeds import derive_seed
from dreambooth.diffusion import model as models
from dreambooth.diffusion.model import DiffusionModel
from dreambooth.evaluation import clean, shares
from dreambooth.evaluation.features import Picture
from dreambooth.evaluation.measures import Measure, summarised
from dreambooth.evaluation.prompt_list import AskedPrompts
from dreambooth.job import fid
from dreambooth.job.previews import GUIDANCE_SCALE, Previews, failure_reason
from dreambooth.job.task import Task
from dreambooth.process import logs
from dreambooth.process.progress import Progress
from dreambooth.training.plan import SCORED_PICTURES, SCORED_STEPS

log = logging.getLogger(__name__)

# The name of each share's line in the log.
LINES: Mapping[str, str] = {
    "subject": "subject_score",
    "class_kept": "class_kept",
    "clean": "clean",
}


def print_scores(task: Task, model: DiffusionModel, previews: Previews) -> dict[str, Measure]:
    """Print `<name>=<plain decimal>` of each of LINES, and return the measures by these names.

    Afterwards the model has the weights of its base. A score that there is not is left out, with a
    warning, so that a tuner sees none and not a false one. No error in scoring may cost the trained
    model; a stop signal still ends the job.
    """
    try:
        found = _measure(task, model, previews)
    except Exception as error:  # a score is not worth failing the job
        log.warning("no scores: %s", failure_reason(error))
        return {}
    scores = {}
    for share, name in LINES.items():
        values = found[share]
        if isinstance(values, str):
            log.warning("no %s: %s", name, values)
        else:
            scores[name] = summarised(values)
            logs.metric(f"{name}={scores[name].mean:.6f}")
    return scores


def _measure(task: Task, model: DiffusionModel, previews: Previews) -> Mapping[str, shares.Found]:
    asked = AskedPrompts(subject=task.dataset.instance_prompt, own_class=task.dataset.class_prompt)
    network = fid.feature_network(task, model)
    drawn = _draw(task, previews, asked.all, "drawing for the scores")
    _give_back_the_base(task, model)
    base = _draw(task, previews, asked.all, "drawing with the base model")
    instance = list(fid.instance_images(task))
    found = shares.measured(
        asked,
        shares.MeasuredPictures(instance=instance, drawn=drawn, base=base),
        network,
        base_loss=functools.partial(clean.denoising_loss, model),
    )
    log.info(
        "scores of %d pictures of each prompt by the model and by its base, guidance %g, %d steps; "
        "features: %s",
        SCORED_PICTURES,
        GUIDANCE_SCALE,
        SCORED_STEPS,
        network.name,
    )
    return found


def _draw(
    task: Task, previews: Previews, prompts: Sequence[str], label: str
) -> dict[str, list[Picture | None]]:
    """Return the pictures of each prompt; picture i of each has the same seed."""
    seed = task.hyperparameters.seed
    seeds = [derive_seed(seed, "scores", number) for number in range(SCORED_PICTURES)]
    drawn: dict[str, list[Picture | None]] = {prompt: [] for prompt in prompts}
    total = len(seeds) * len(prompts)
    with Progress(total, label, stream=sys.stderr, unit="pictures") as progress:
        for prompt in prompts:
            for picture in previews.draw(prompt, seeds, num_inference_steps=SCORED_STEPS):
                drawn[prompt].append(picture)
                progress.update(sum(map(len, drawn.values())))
    return drawn


def _give_back_the_base(task: Task, model: DiffusionModel) -> None:
    """Copy the base model's weights over the trained ones."""
    base = models.load(task.model_folder, device=torch.device("cpu"))
    model.unet.load_state_dict(base.unet.state_dict())
    if task.hyperparameters.train_text_encoder:
        model.text_encoder.load_state_dict(base.text_encoder.state_dict())
