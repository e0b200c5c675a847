"""Encode each picture and prompt once, before the first step."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from dreambooth.data import cache, masks
from dreambooth.diffusion import model as models
from dreambooth.diffusion.model import DiffusionModel
from dreambooth.errors import DatasetError
from dreambooth.job import class_sampling, meter_pictures, metering
from dreambooth.job.task import Task
from dreambooth.process.progress import Progress
from dreambooth.training import loop, subjects_kept

Text = dict[str, torch.Tensor]


def encode(
    task: Task, model: DiffusionModel, class_paths: Sequence[Path]
) -> tuple[loop.TrainingData, Text]:
    """Encode pictures and prompts; return the training data and the text of sample pictures.

    The latter is prompt -> encoder_hidden_states, empty where the text encoder is trained.
    """
    settings, dataset = task.hyperparameters, task.dataset
    subjects = dataset.subjects
    total = len(dataset.instance_images) + len(class_paths)
    known_latents = class_sampling.known_latents(task, model)

    def posteriors(
        stream: str, paths: Sequence[Path], done: int, groups: tuple[range, ...]
    ) -> cache.LatentPosteriors:
        built = cache.build(
            paths,
            resolution=task.resolution,
            center_crop=settings.center_crop,
            crops_per_picture=task.plan.cached_crops,
            seed=settings.seed,
            stream=stream,
            encode_image=lambda pixels: models.encode_posterior(model, pixels),
            known=known_latents,
            sha256=dataset.sha256,
            mask_of=mask_of if settings.masked_loss and stream == "instance" else None,
            on_image=lambda count: progress.update(done + count),
        )
        return replace(built, groups=groups).to(task.device)

    def mask_of(path: Path, size: tuple[int, int]) -> Image.Image | None:
        return masks.read(path, dataset.masks.get(path), size=size)

    def text(*prompts: str) -> torch.Tensor:
        rows = [models.encode_text(model, models.tokenize(model, [one])) for one in prompts]
        return torch.cat(rows)

    def train_text(*prompts: str) -> torch.Tensor:
        if settings.train_text_encoder:  # its output changes with every step
            return models.tokenize(model, list(prompts)).to(task.device)
        return text(*prompts)

    with_class = settings.with_prior_preservation
    prompts = list(dict.fromkeys(dataset.prompts))
    text_rows = {prompt: row for row, prompt in enumerate(prompts)}
    class_prompts = [given.class_prompt for given in dataset.class_sets]
    class_rows = [class_prompts.index(each.class_prompt or "") for each in subjects if with_class]
    in_turn = subjects_kept.prompts_in_turn(task.plan.kept_subjects, dataset)
    kept_prompts = list(dict.fromkeys(in_turn))
    groups: tuple[range, ...] = ()
    class_groups: tuple[range, ...] = ()
    if dataset.are_several:
        groups = _ranges([len(each.instance_images) for each in subjects])
        class_sets = _ranges(task.plan.class_sets)
        class_groups = tuple(class_sets[row] for row in class_rows if class_sets)
    with Progress(total, "encoding", stream=sys.stderr, unit="pictures") as progress:
        first = len(dataset.instance_images)
        instance = posteriors("instance", dataset.instance_images, 0, groups)
        class_ = posteriors("class", class_paths, first, class_groups) if class_paths else None
    if instance.weights is not None and bool((instance.weights == 1).all()):
        raise DatasetError(
            "masked_loss=True, and no instance image has a mask: put NAME.mask.png, white where "
            "the subject is, beside NAME.jpg, or give pictures with transparency."
        )
    data = loop.TrainingData(
        instance=instance,
        class_=class_,
        instance_text=train_text(*prompts),
        class_text=train_text(*class_prompts) if with_class else None,
        latent_scale=float(model.vae.config.scaling_factor),
        prior_text=text(*class_prompts) if with_class else None,
        empty_text=train_text("") if settings.predicts_the_prior else None,
        prior_empty_text=text("") if settings.predicts_the_prior else None,
        text_rows=tuple(text_rows[prompt] for prompt in dataset.prompts),
        class_rows=tuple(class_rows),
        kept_text=train_text(*kept_prompts) if kept_prompts else None,
        kept_prior_text=text(*kept_prompts) if kept_prompts else None,
        kept_rows=tuple(kept_prompts.index(prompt) for prompt in in_turn),
    )
    if settings.train_text_encoder:
        return data, {}
    return data, {prompt: text(prompt) for prompt in _used_prompts(task)}


def _ranges(counts: Sequence[int]) -> tuple[range, ...]:
    """Return the places of groups of these sizes that lie one after the other."""
    ends = itertools.accumulate(counts)
    return tuple(range(end - count, end) for count, end in zip(counts, ends, strict=True))


def _used_prompts(task: Task) -> tuple[str, ...]:
    """Return the prompts that pictures are drawn with or the meter reads, and the empty one."""
    of_classes = task.dataset.class_sets if task.hyperparameters.compute_scores else ()
    drawn = (
        *task.sample_prompts,
        *(subject.instance_prompt for subject in task.dataset.subjects),
        *(given.class_prompt for given in of_classes),
        *meter_pictures.prompts(task).values(),
        "",
    )
    read = itertools.chain.from_iterable(metering.prompts(task).values())
    return tuple(dict.fromkeys((*drawn, *read)))
