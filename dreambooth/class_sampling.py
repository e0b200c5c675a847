"""Samples the class images that are missing, with the base model, which is gone afterwards."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from dreambooth import outputs
from dreambooth.data import class_images, fingerprint
from dreambooth.diffusion import model as models
from dreambooth.diffusion import sampling
from dreambooth.diffusion.model import DiffusionModel
from dreambooth.diffusion.sampling_request import SamplingRequest
from dreambooth.limits import LIMITS
from dreambooth.progress import Progress
from dreambooth.task import Task
from dreambooth.training.precision import DTYPES

NUM_INFERENCE_STEPS = 50  # the pipeline's own defaults, as the originals use them
GUIDANCE_SCALE = 7.5


def class_image_paths(task: Task) -> Sequence[Path]:
    """Class images given and sampled; none without prior preservation.

    The sampler is loaded only where pictures are missing and has left the memory on return.
    """
    if not task.samples_class_images:
        return ()
    if task.plan.class_images_to_sample <= 0:
        return task.dataset.class_images
    origin = fingerprint.of_texts(
        task.dataset.class_prompt or "",
        task.model_fingerprint(),
        str(task.resolution),
        str(task.hyperparameters.seed),
        task.plan.prior_generation_precision,
        str(NUM_INFERENCE_STEPS),
    )
    folder = outputs.class_image_folder(task.environment)
    if task.environment.checkpoint_dir is not None:
        folder /= origin
    sampler = _Sampler(task)
    missing = task.plan.class_images_to_sample
    with Progress(missing, "sampling class images", stream=sys.stderr, unit="pictures") as progress:
        paths = class_images.ensure(
            folder,
            given=task.dataset.class_images,
            count=task.hyperparameters.num_class_images,
            batch_size=min(task.hyperparameters.batch_size, LIMITS.max_generated_batch),
            seed=task.hyperparameters.seed,
            sample=sampler,
            fingerprint=origin,
            on_image=progress.update,
        )
    sampler.unload()
    return paths


class _Sampler:
    """seeds -> pictures with the class prompt; loads the model at its first call."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._model: DiffusionModel | None = None

    def __call__(self, seeds: Sequence[int]) -> Sequence[npt.NDArray[np.uint8] | None]:
        task = self._task
        if self._model is None:
            dtype = DTYPES[task.plan.prior_generation_precision]
            self._model = models.load(task.model_folder, device=task.device, dtype=dtype)
        requests = [
            SamplingRequest(
                prompt=task.dataset.class_prompt or "",
                num_inference_steps=NUM_INFERENCE_STEPS,
                guidance_scale=GUIDANCE_SCALE,
                width=task.resolution,
                height=task.resolution,
                seed=seed,
            )
            for seed in seeds
        ]
        return list(sampling.generate(self._model, requests, batch_size=len(requests)))

    def unload(self) -> None:
        """Give the memory back before training begins."""
        self._model = None
        gc.collect()
        if self._task.device.type == "cuda":
            torch.cuda.empty_cache()
