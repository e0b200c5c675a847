"""Samples the class images that are missing, with the base model, which is gone afterwards."""

from __future__ import annotations

import gc
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dreambooth import outputs
from dreambooth.data import class_images, class_latents, fingerprint
from dreambooth.data.class_images import Sampled
from dreambooth.diffusion import model as models
from dreambooth.diffusion import sampling
from dreambooth.diffusion.decoding import decode
from dreambooth.diffusion.denoising import advance
from dreambooth.diffusion.facts import read_facts
from dreambooth.diffusion.model import DiffusionModel
from dreambooth.diffusion.sampling_request import SamplingRequest, check
from dreambooth.diffusion.schedules import Schedules
from dreambooth.errors import ModelArtifactError, ResourceError
from dreambooth.limits import LIMITS
from dreambooth.progress import Progress
from dreambooth.task import Task
from dreambooth.training.memory import usable_bytes
from dreambooth.training.precision import DTYPES

log = logging.getLogger(__name__)

NUM_INFERENCE_STEPS = 25
GUIDANCE_SCALE = 7.5  # the pipeline's own default, as the originals use it
BATCH_SIZE = 8  # 16 rows of a U-Net call, with guidance: more gain little on any device

# DPM-Solver++ (arXiv 2211.01095), second-order multistep, over the base model's own noise schedule:
# its betas, timesteps and prediction type. What other noise schedulers say of their solvers goes.
SOLVER = "DPMSolverMultistepScheduler"
_SOLVER_SETTINGS = {
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "solver_order": 2,
    "lower_order_final": True,
    "final_sigmas_type": "zero",
}
_STEPS_OF_ITS_OWN = 50  # of a model whose noise schedule the solver does not know

# Live elements at the peak of a U-Net call without gradients, per row, channel and latent cell:
# counted at full size (65 MiB a row in half precision), and a half more for workspaces.
_ROW_TENSORS = 4.3


def class_image_paths(task: Task) -> Sequence[Path]:
    """Class images given and sampled; none without prior preservation.

    The sampler is loaded only where pictures are missing and has left the memory on return.
    """
    if not task.samples_class_images:
        return ()
    missing = task.plan.class_images_to_sample
    if missing <= 0:
        return task.dataset.class_images
    sampler = _Sampler(task)
    with Progress(missing, "sampling class images", stream=sys.stderr, unit="pictures") as progress:
        paths = class_images.ensure(
            _folder(task),
            given=task.dataset.class_images,
            count=task.hyperparameters.num_class_images,
            batch_size=batch_size(task),
            seed=task.hyperparameters.seed,
            sample=sampler,
            fingerprint=_origin(task),
            on_image=progress.update,
        )
    sampler.unload()
    return paths


def known_latents(task: Task, model: DiffusionModel) -> Callable[[Path], torch.Tensor | None]:
    """Path of a class image -> its latents float32 [C,h,w], unscaled, where this job sampled it.

    None for pictures that were given, and where the latents are gone.
    """
    if task.plan.class_images_to_sample <= 0:
        return lambda path: None
    origin, folder = _origin(task), _folder(task)
    cells = task.resolution // model.vae_scale_factor
    shape = (model.latent_channels, cells, cells)
    scale = float(model.vae.config.scaling_factor)

    def latents_of(path: Path) -> torch.Tensor | None:
        if path.parent != folder:
            return None
        latents = class_latents.read(path, origin=origin, shape=shape)
        return None if latents is None else torch.from_numpy(latents) / scale

    return latents_of


def batch_size(task: Task) -> int:
    """How many class images share the U-Net's calls: what fits beside the weights, at least one.

    A function of the device, the model and the settings alone, so that a job that goes on samples
    in the batches that it began with. On a CPU memory is no question.
    """
    wanted = min(max(BATCH_SIZE, task.hyperparameters.batch_size), LIMITS.max_generated_batch)
    whole = replace(task.plan.device, free_bytes=None)  # what is free differs from start to start
    usable = usable_bytes(whole)
    if usable is None:
        return wanted
    facts = read_facts(task.model_folder)
    element = DTYPES[task.plan.prior_generation_precision].itemsize
    parameters = facts.unet_parameters + facts.text_encoder_parameters + facts.vae_parameters
    area = (task.resolution / facts.resolution) ** 2
    picture = 2 * _ROW_TENSORS * facts.unet_layer_elements * area  # two rows: it is guided
    # Pictures are decoded one by one, when the U-Net's call is over.
    return max(1, min(wanted, int((usable - element * parameters) // (element * picture))))


def _origin(task: Task) -> str:
    """What a sampled picture depends on, its seed apart."""
    return fingerprint.of_texts(
        task.dataset.class_prompt or "",
        task.model_fingerprint(),
        str(task.resolution),
        str(task.hyperparameters.seed),
        task.plan.prior_generation_precision,
        SOLVER,
        str(NUM_INFERENCE_STEPS),
    )


def _folder(task: Task) -> Path:
    folder = outputs.class_image_folder(task.environment)
    return folder / _origin(task) if task.environment.checkpoint_dir is not None else folder


def with_fast_solver(model: DiffusionModel) -> tuple[DiffusionModel, int]:
    """The same model with DPM-Solver++ as its noise scheduler, and the steps that suit it.

    As it was, with the pipeline's 50 steps, where diffusers' solver refuses its noise schedule.
    """
    steps = sampling.sampling_facts(model).max_steps
    fast = replace(
        model,
        scheduler_class=SOLVER,
        scheduler_config={**model.scheduler_config, **_SOLVER_SETTINGS},
    )
    try:
        models.sampling_scheduler(fast)
    except (ModelArtifactError, NotImplementedError):
        return model, min(_STEPS_OF_ITS_OWN, steps)
    return fast, min(NUM_INFERENCE_STEPS, steps)


class _Sampler:
    """seeds -> pictures with the class prompt; loads the model at its first call."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._model: DiffusionModel | None = None
        self._schedules: Schedules | None = None
        self._steps = NUM_INFERENCE_STEPS
        self._text: dict[str, torch.Tensor] = {}
        self._most = LIMITS.max_generated_batch
        self._pictures, self._seconds = 0, 0.0

    def __call__(self, seeds: Sequence[int]) -> Sequence[Sampled | None]:
        while True:
            most = min(self._most, len(seeds))
            try:
                return [
                    sampled
                    for start in range(0, len(seeds), most)
                    for sampled in self._timed(seeds[start : start + most])
                ]
            except torch.OutOfMemoryError as error:
                if most == 1:
                    raise ResourceError(
                        "The device ran out of memory while sampling one class image: lower "
                        "resolution, set prior_generation_precision to fp16, or set "
                        "prior_preservation_mode to prediction, which samples none."
                    ) from error
            self._most = most // 2
            log.warning("memory ran out sampling %d class images at once: now %d", most, self._most)
            _empty_the_cache()

    def _timed(self, seeds: Sequence[int]) -> list[Sampled | None]:
        model, schedules = self._loaded()
        began = time.monotonic()
        made = self._sample(model, schedules, seeds)
        self._seconds += time.monotonic() - began
        self._pictures += len(made)
        return made

    @torch.no_grad()
    def _sample(
        self, model: DiffusionModel, schedules: Schedules, seeds: Sequence[int]
    ) -> list[Sampled | None]:
        requests = [
            SamplingRequest(
                prompt=self._task.dataset.class_prompt or "",
                num_inference_steps=self._steps,
                guidance_scale=GUIDANCE_SCALE,
                width=self._task.resolution,
                height=self._task.resolution,
                seed=seed,
            )
            for seed in seeds
        ]
        check(sampling.sampling_facts(model), requests[0])  # they differ in their seeds alone
        text = sampling.text_rows(model, requests, self._text)
        pictures = [sampling.start(model, request, schedules) for request in requests]
        while not pictures[0].finished:
            advance(model.unet, pictures, text)
        return [self._decoded(model, picture.latents) for picture in pictures]

    def _loaded(self) -> tuple[DiffusionModel, Schedules]:
        if self._model is None or self._schedules is None:
            dtype = DTYPES[self._task.plan.prior_generation_precision]
            model = models.load(self._task.model_folder, device=self._task.device, dtype=dtype)
            self._model, self._steps = with_fast_solver(model)
            self._schedules = sampling.schedules_of(self._model)
        return self._model, self._schedules

    @staticmethod
    def _decoded(model: DiffusionModel, latents: torch.Tensor) -> Sampled | None:
        pictures = decode(model, latents)
        if pictures is None:
            return None
        return Sampled(picture=pictures[0], latents=latents[0].float().cpu().numpy())

    def unload(self) -> None:
        """Give the memory back before training begins, and say what sampling took."""
        if self._pictures:
            log.info("%d class images sampled in %.2f s", self._pictures, self._seconds)
        self._model = self._schedules = None
        self._text.clear()
        _empty_the_cache()


def _empty_the_cache() -> None:
    """What nothing refers to goes back to the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
