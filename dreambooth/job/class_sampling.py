"""Sample the missing class images with the base model, and unload it afterwards."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dreambooth.data import class_images, class_latents, fingerprint
from dreambooth.data.class_images import Sampled, SamplingShare
from dreambooth.diffusion import model as models
from dreambooth.diffusion import sampling
from dreambooth.diffusion.device_memory import free_caches
from dreambooth.diffusion.model import DiffusionModel
from dreambooth.diffusion.sampling_request import SamplingRequest
from dreambooth.diffusion.schedules import Schedules
from dreambooth.errors import ModelArtifactError, ResourceError
from dreambooth.fast.cuda_graphs import CudaGraphCapturer, GraphCapturer
from dreambooth.fast.graphed_unet import GraphedUNet
from dreambooth.job import outputs
from dreambooth.job.task import Task
from dreambooth.model_folder.facts import read_facts
from dreambooth.process.memory import is_out_of_memory
from dreambooth.process.progress import Progress
from dreambooth.training import expected_memory
from dreambooth.training.device import DeviceFacts
from dreambooth.training.memory_plan import usable_bytes
from dreambooth.training.mixed_precision import DTYPES

log = logging.getLogger(__name__)

NUM_INFERENCE_STEPS = 25
GUIDANCE_SCALE = 7.5  # the pipeline's default, which the originals use too

# DPM-Solver++ (arXiv 2211.01095), second-order multistep, over the base model's own noise schedule:
# its betas, timesteps and prediction type. The settings of the model's own solver are overridden.
SOLVER = "DPMSolverMultistepScheduler"
_SOLVER_SETTINGS = {
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "solver_order": 2,
    "lower_order_final": True,
    "final_sigmas_type": "zero",
}
_FALLBACK_STEPS = 50  # for a model whose noise schedule DPM-Solver++ refuses


def class_image_paths(
    task: Task,
    capture_on: Callable[[torch.device], GraphCapturer] = CudaGraphCapturer,
    share: SamplingShare | None = None,
) -> Sequence[Path]:
    """Return the paths of the class images: those given, then those sampled.

    There are none where the run does not train on class images. The base model is loaded only
    where pictures are missing, and is unloaded again. capture_on: device -> what captures the
    U-Net's calls there, used where the training plan has the fast step. share: this process's part,
    where several sample.
    """
    if not task.hyperparameters.trains_on_class_images:
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
            fingerprint=_sampling_fingerprint(task),
            elsewhere=outputs.elsewhere_for_class_images(task.environment),
            on_image=progress.update,
            share=share,
        )
    sampler.unload()
    return paths


def known_latents(task: Task, model: DiffusionModel) -> Callable[[Path], torch.Tensor | None]:
    """Return a function: path of a class image -> its latents float32 [C,h,w], unscaled.

    It returns None for pictures that were given, and where no usable latents are stored.
    """
    if task.plan.class_images_to_sample <= 0:
        return lambda path: None
    origin, folder = _sampling_fingerprint(task), _folder(task)
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
    """Return how many class images make a batch: as many as fit beside the weights, at least one.

    The number depends on the device, the model and the settings alone, so that a resumed job
    samples in the batches that it began with. On a CPU memory sets no limit.
    """
    # Free memory differs from start to start, so it is left out here; the number of processes too,
    # whose class images are those of one.
    return _images_that_fit(task, replace(task.plan.device, free_bytes=None), processes=1)


def pictures_per_call(task: Task) -> int:
    """Return how many pictures of a batch share a U-Net call: as many as fit in free memory.

    Memory that this process may not take (`torch.cuda.set_per_process_memory_fraction`) does not
    count as free.
    """
    return _images_that_fit(task, task.plan.device, processes=task.plan.processes)


def _images_that_fit(task: Task, device: DeviceFacts, *, processes: int) -> int:
    return expected_memory.class_batch(
        task.hyperparameters,
        read_facts(task.model_folder),
        task.plan.prior_generation_precision,
        usable_bytes(device, processes),
    )


def _sampling_fingerprint(task: Task) -> str:
    """Return a hash of all that a sampled picture depends on, except its own seed."""
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
    if task.workspace is not None:
        return task.workspace / "class_images"
    folder = outputs.class_image_folder(task.environment)
    return (
        folder / _sampling_fingerprint(task)
        if task.environment.checkpoint_dir is not None
        else folder
    )


def with_fast_solver(model: DiffusionModel) -> tuple[DiffusionModel, int]:
    """Return the model with DPM-Solver++ as its noise scheduler, and its num_inference_steps.

    Where diffusers' DPM-Solver++ refuses the noise schedule, the model is returned as it is, with
    the pipeline's 50 steps. The steps are capped at what the noise schedule allows.
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
        return model, min(_FALLBACK_STEPS, steps)
    return fast, min(NUM_INFERENCE_STEPS, steps)


class _Sampler:
    """Samples pictures of the class prompt, one per seed; loads the model at its first call."""

    def __init__(self, task: Task, capture_on: Callable[[torch.device], GraphCapturer]) -> None:
        self._task, self._capture_on = task, capture_on
        self._model: DiffusionModel | None = None
        self._schedules: Schedules | None = None
        self._text: dict[str, torch.Tensor] = {}  # encoded once, for all batches
        self._steps = NUM_INFERENCE_STEPS
        self._most = pictures_per_call(task)
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
            except (RuntimeError, MemoryError, ResourceError) as error:
                if not is_out_of_memory(error):
                    raise
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
        latents: list[torch.Tensor] = []
        pictures = sampling.generate(
            model,
            requests,
            batch_size=len(requests),
            schedules=schedules,
            text=self._text,
            on_latents=latents.append,
        )
        return [
            None
            if picture is None
            else Sampled(picture=picture, latents=latents[-1][0].float().cpu().numpy())
            for picture in pictures
        ]

    def _loaded(self) -> tuple[DiffusionModel, Schedules]:
        if self._model is None or self._schedules is None:
            dtype = DTYPES[self._task.plan.prior_generation_precision]
            model = models.load(self._task.model_folder, device=self._task.device, dtype=dtype)
            self._model, self._steps = with_fast_solver(model)
            if self._task.plan.fast_step:
                capturer = self._capture_on(self._task.device)  # graphs change no picture
                self._model.unet = GraphedUNet(self._model.unet, capturer).eval()
            self._schedules = sampling.schedules_of(self._model)
            for text in (self._task.dataset.class_prompt or "", ""):
                self._text[text] = models.encode_text(model, models.tokenize(model, [text]))
        return self._model, self._schedules

    def unload(self) -> None:
        """Free the model's memory before training begins, and log how long sampling took."""
        if self._pictures:
            log.info("%d class images sampled in %.2f s", self._pictures, self._seconds)
        self._model = self._schedules = None
        self._text.clear()
        free_caches()
