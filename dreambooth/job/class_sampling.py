"""Samples the class images that are missing, with the base model, which is gone afterwards."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dreambooth.data import class_images, class_latents, fingerprint
from dreambooth.data.class_images import Sampled
from dreambooth.diffusion import model as models
from dreambooth.diffusion import sampling
from dreambooth.diffusion.decoding import decode
from dreambooth.diffusion.denoising import advance
from dreambooth.diffusion.device_memory import free_caches
from dreambooth.diffusion.model import DiffusionModel
from dreambooth.diffusion.sampling_request import SamplingRequest, check
from dreambooth.diffusion.schedules import Schedules
from dreambooth.errors import ModelArtifactError, ResourceError
from dreambooth.fast.cuda_graphs import CudaGraphCapturer, GraphCapturer
from dreambooth.fast.graphed_unet import GraphedUNet
from dreambooth.job import outputs
from dreambooth.job.task import Task
from dreambooth.model_folder.facts import read_facts
from dreambooth.process.progress import Progress
from dreambooth.training import expected_memory
from dreambooth.training.device import DeviceFacts
from dreambooth.training.memory_plan import usable_bytes
from dreambooth.training.mixed_precision import DTYPES

log = logging.getLogger(__name__)

NUM_INFERENCE_STEPS = 25
GUIDANCE_SCALE = 7.5  # the pipeline's own default, as the originals use it

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


def class_image_paths(
    task: Task, capture_on: Callable[[torch.device], GraphCapturer] = CudaGraphCapturer
) -> Sequence[Path]:
    """Class images given and sampled; none without prior preservation.

    The sampler is loaded only where pictures are missing and has left the memory on return.
    capture_on: what captures the U-Net's calls on a device where the plan has the fast step.
    """
    if not task.samples_class_images:
        return ()
    missing = task.plan.class_images_to_sample
    if missing <= 0:
        return task.dataset.class_images
    sampler = _Sampler(task, capture_on)
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
    """How many class images make a batch: what fits beside the weights, at least one.

    A function of the device, the model and the settings alone, so that a job that goes on samples
    in the batches that it began with. On a CPU memory is no question.
    """
    # What is free differs from start to start.
    return _that_fit(task, replace(task.plan.device, free_bytes=None))


def most_at_once(task: Task) -> int:
    """How many pictures of a batch share a U-Net call: what fits into the memory that is free, or
    that this process may take (`torch.cuda.set_per_process_memory_fraction`).
    """
    return _that_fit(task, task.plan.device)


def _that_fit(task: Task, device: DeviceFacts) -> int:
    return expected_memory.class_batch(
        task.hyperparameters,
        read_facts(task.model_folder),
        task.plan.prior_generation_precision,
        usable_bytes(device),
    )


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
        *(["channels_last"] if task.plan.fast_step else []),
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


def _speed_up(model: DiffusionModel, capturer: GraphCapturer) -> None:
    """What the fast step adds: channels last, which changes pictures by rounding, and the U-Net's
    calls replayed as a CUDA graph, which changes none. Nobody has measured either on a GPU.
    """
    for part in (model.unet, model.vae):
        part.to(memory_format=torch.channels_last)
    model.unet = GraphedUNet(model.unet, capturer).eval()


class _Sampler:
    """seeds -> pictures with the class prompt; loads the model at its first call."""

    def __init__(self, task: Task, capture_on: Callable[[torch.device], GraphCapturer]) -> None:
        self._task, self._capture_on = task, capture_on
        self._model: DiffusionModel | None = None
        self._schedules: Schedules | None = None
        self._steps = NUM_INFERENCE_STEPS
        self._text: dict[str, torch.Tensor] = {}
        self._most = most_at_once(task)
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
            if self._model is not None and isinstance(self._model.unet, GraphedUNet):
                self._model.unet.release("memory ran out in sampling")
            self._most = most // 2
            log.warning("memory ran out sampling %d class images at once: now %d", most, self._most)
            free_caches()

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
            if self._task.plan.fast_step:
                _speed_up(self._model, self._capture_on(self._task.device))
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
        free_caches()
