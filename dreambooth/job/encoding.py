"""Encode each picture and prompt once, before the first step."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from dreambooth.data import cache
from dreambooth.diffusion import model as models
from dreambooth.diffusion.model import DiffusionModel
from dreambooth.job import class_sampling
from dreambooth.job.task import Task
from dreambooth.process.progress import Progress
from dreambooth.training import loop

Text = dict[str, torch.Tensor]


def encode(
    task: Task, model: DiffusionModel, class_paths: Sequence[Path]
) -> tuple[loop.TrainingData, Text]:
    """Encode pictures and prompts; return the training data and the text of sample pictures.

    The latter is prompt -> encoder_hidden_states, empty where the text encoder is trained.
    """
    settings, dataset = task.hyperparameters, task.dataset
    total = len(dataset.instance_images) + len(class_paths)
    known_latents = class_sampling.known_latents(task, model)

    def posteriors(stream: str, paths: Sequence[Path], done: int) -> cache.LatentPosteriors:
        return cache.build(
            paths,
            resolution=task.resolution,
            center_crop=settings.center_crop,
            crops_per_picture=task.plan.cached_crops,
            seed=settings.seed,
            stream=stream,
            encode_image=lambda pixels: models.encode_posterior(model, pixels),
            known=known_latents,
            sha256=dataset.sha256,
            on_image=lambda count: progress.update(done + count),
        ).to(task.device)

    def text(prompt: str) -> torch.Tensor:
        return models.encode_text(model, models.tokenize(model, [prompt]))

    def train_text(prompt: str) -> torch.Tensor:
        if settings.train_text_encoder:  # its output changes with every step
            return models.tokenize(model, [prompt]).to(task.device)
        return text(prompt)

    with Progress(total, "encoding", stream=sys.stderr, unit="pictures") as progress:
        first = len(dataset.instance_images)
        instance = posteriors("instance", dataset.instance_images, 0)
        class_ = posteriors("class", class_paths, first) if class_paths else None
    class_prompt = dataset.class_prompt if settings.with_prior_preservation else None
    data = loop.TrainingData(
        instance=instance,
        class_=class_,
        instance_text=train_text(dataset.instance_prompt),
        class_text=train_text(class_prompt) if class_prompt is not None else None,
        latent_scale=float(model.vae.config.scaling_factor),
        prior_text=text(class_prompt) if class_prompt is not None else None,
        empty_text=train_text("") if settings.predicts_the_prior else None,
        prior_empty_text=text("") if settings.predicts_the_prior else None,
    )
    if settings.train_text_encoder:
        return data, {}
    return data, {prompt: text(prompt) for prompt in _sampled_prompts(task)}


def _sampled_prompts(task: Task) -> tuple[str, ...]:
    """Return the prompts that pictures are drawn with, and the empty negative prompt."""
    of_class = task.dataset.class_prompt if task.hyperparameters.compute_scores else None
    return (task.sample_prompt, task.dataset.instance_prompt, of_class or "", "")
