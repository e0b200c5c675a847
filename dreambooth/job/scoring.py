"""Print the shares that tuners read: subject learned, class kept, pictures clean (compute_scores).

The model draws first; then the base's weights take the place of the trained ones, so that the
device never holds a second U-Net.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Mapping, Sequence

import torch

from dreambooth.data.seeds import derive_seed
from dreambooth.diffusion import model as models
from dreambooth.diffusion.model import DiffusionModel
from dreambooth.evaluation import clean, confusion, shares
from dreambooth.evaluation.features import FeatureNetwork, Picture
from dreambooth.evaluation.measures import Measure, summarised
from dreambooth.evaluation.prompt_list import AskedPrompts
from dreambooth.job import fid
from dreambooth.job.previews import GUIDANCE_SCALE, Previews, failure_reason
from dreambooth.job.task import Task
from dreambooth.process import logs
from dreambooth.process.progress import Progress
from dreambooth.training import meter_budget
from dreambooth.training.plan import SCORED_PICTURES, SCORED_STEPS

log = logging.getLogger(__name__)

# The name of each share's line in the log.
LINES: Mapping[str, str] = {
    "subject": "subject_score",
    "class_kept": "class_kept",
    "clean": "clean",
}


def print_scores(
    task: Task,
    model: DiffusionModel,
    previews: Previews,
    give_back_the_base: Callable[[], None],
) -> dict[str, Measure]:
    """Print `<name>=<plain decimal>` of each of LINES, and return the measures by these names.

    Afterwards the model has the weights of its base, which `give_back_the_base` copies. A score
    that there is not is left out, with a warning, so that a tuner sees none and not a false one. No
    error in scoring may cost the trained model; a stop signal still ends the job.
    """
    try:
        found = _measure(task, model, previews, give_back_the_base)
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
    for name, values in found.items():
        if name not in LINES and not isinstance(values, str):
            scores[name] = summarised(values)
            log.info("%s: %.4f", name, scores[name].mean)
    return scores


def _measure(
    task: Task,
    model: DiffusionModel,
    previews: Previews,
    give_back_the_base: Callable[[], None],
) -> Mapping[str, shares.Found]:
    """Return the shares of all subjects together, then the "subject_score of" each of several."""
    subjects = task.dataset.subjects
    asked = [
        AskedPrompts(subject=each.instance_prompt, own_class=each.class_prompt) for each in subjects
    ]
    prompts = list(dict.fromkeys(prompt for each in asked for prompt in each.all))
    network = fid.feature_network(task, model)
    drawn = _draw(task, previews, prompts, "drawing for the scores")
    give_back_the_base()
    base = _draw(task, previews, prompts, "drawing with the base model")
    of_each = _of_each_subject(task, model, network, asked, drawn, base)
    joined = confusion.together(asked, of_each)
    found = {share: joined[share] for share in LINES}
    for subject, each in zip(subjects, of_each, strict=True):
        if task.dataset.are_several:
            found[f"subject_score of {subject.name}"] = each["subject"]
    log.info(
        "scores of %d pictures of each prompt by the model and by its base, guidance %g, %d steps; "
        "features: %s",
        SCORED_PICTURES,
        GUIDANCE_SCALE,
        SCORED_STEPS,
        network.name,
    )
    return found


def _of_each_subject(
    task: Task,
    base_model: DiffusionModel,
    network: FeatureNetwork,
    asked: Sequence[AskedPrompts],
    drawn: shares.Drawn,
    base: shares.Drawn,
) -> list[dict[str, shares.Found]]:
    """Return what `shares.measured` finds in the pictures of each subject. base: may be empty."""
    return [
        shares.measured(
            one,
            shares.MeasuredPictures(
                instance=list(fid.instance_images(task, subject)),
                drawn={prompt: drawn[prompt] for prompt in one.all},
                base={prompt: base[prompt] for prompt in one.all if prompt in base},
            ),
            network,
            base_loss=functools.partial(clean.denoising_loss, base_model),
        )
        for one, subject in zip(asked, task.dataset.subjects, strict=True)
    ]


def scores_over_steps(
    task: Task, model: DiffusionModel, pictures: Mapping[int, Mapping[str, Picture]]
) -> dict[int, dict[str, float]]:
    """Return those of the shares that there are for each step, of one picture of each prompt.

    model: with the weights of its base. pictures: of each step by prompt; the base's are those of
    step 0, without which there are fewer shares.
    """
    asked = [
        AskedPrompts(
            subject=each.instance_prompt,
            elsewhere=(each.instance_prompt + meter_budget.PLACE,),
            own_class=each.class_prompt,
            other_class=meter_budget.prompts(task.dataset)["other_class"],
        )
        for each in task.dataset.subjects
    ]
    every = list(dict.fromkeys(prompt for each in asked for prompt in each.all))
    of_each = _of_each_subject(
        task,
        model,
        fid.feature_network(task, model),
        asked,
        drawn={prompt: [row[prompt] for row in pictures.values()] for prompt in every},
        base={prompt: [pictures[0][prompt]] for prompt in every} if 0 in pictures else {},
    )
    joined = confusion.together(asked, of_each)
    # Each share holds a number for every step, once for each prompt or subject that it looks at.
    rows = {
        name: found.reshape(-1, len(pictures)).mean(axis=0)
        for name in shares.SHARES
        if not isinstance(found := joined[name], str)
    }
    return {
        step: {name: float(row[number]) for name, row in rows.items()}
        for number, step in enumerate(pictures)
    }


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


def give_back_the_base(task: Task, model: DiffusionModel) -> None:
    """Copy the base model's weights over the trained ones."""
    base = models.load(task.model_folder, device=torch.device("cpu"))
    model.unet.load_state_dict(base.unet.state_dict())
    if task.hyperparameters.train_text_encoder:
        model.text_encoder.load_state_dict(base.text_encoder.state_dict())
