"""Sampling: turns requests into pictures, with one random generator per picture.

The denoising loop is our own (its step is in `denoising`). Pictures are those of
``StableDiffusionPipeline`` with a list of CPU generators: same initial noise, same order of the
guidance halves, same noise-scheduler mathematics; in float32 on a CPU within 1/255.

Legend: B pictures of a batch, G of them guided, C latent channels, h w latent cells, L tokens, D
text width, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from dreambooth.diffusion.decoding import decode
from dreambooth.diffusion.denoising import TextRows, advance
from dreambooth.diffusion.model import DiffusionModel, encode_text, sampling_scheduler, tokenize
from dreambooth.diffusion.sampling_request import (
    SamplingFacts,
    SamplingRequest,
    check,
    facts_from,
    picture_size,
)
from dreambooth.diffusion.schedules import Schedules
from dreambooth.diffusion.step_tables import timesteps_of
from dreambooth.diffusion.trajectories import Trajectory
from dreambooth.errors import RequestError, ResourceError
from dreambooth.limits import LIMITS, Limits
from dreambooth.process.memory import is_out_of_memory


def generate(
    model: DiffusionModel,
    requests: Sequence[SamplingRequest],
    *,
    batch_size: int = 4,
    on_step: Callable[[int, int], None] | None = None,
    text: Mapping[str, Tensor] | None = None,
    schedules: Schedules | None = None,
    on_latents: Callable[[Tensor], None] = lambda latents: None,
    limits: Limits = LIMITS,
) -> Iterator[np.ndarray | None]:
    """Sample every request; yield uint8 [H, W, 3] pictures (0..255) in the order of the requests.

    None is yielded for a picture that did not stay finite. Consecutive requests with equal steps
    and size share U-Net calls, at most `batch_size` pictures at a time; their guidance, eta and
    prompts may differ. A picture depends on its own request alone: those that share its calls
    change it by rounding only (at most 2/255 in float32). on_step(done, total) is called after each
    U-Net call, counted over all batches (`count_steps`). text: ready encoder_hidden_states ([L, D]
    or [1, L, D]) by prompt; the text encoder is needed only for prompts that it lacks. schedules:
    as `schedules_of` returns them, kept by a caller that samples again. on_latents is called with
    the clean latents of each picture, float32 [1, C, h, w], before they are decoded.

    The model is left as it was (train or eval mode, gradients) and the global random generators are
    not used, so a preview may run in the middle of training.

    Raises RequestError at once, before any work, for a request that the model cannot serve, and
    ResourceError if the device runs out of memory.
    """
    facts = sampling_facts(model)
    for request in requests:
        check(facts, request, limits=limits)
    if not 1 <= batch_size <= limits.max_generated_batch:
        raise RequestError(
            f"batch_size must lie between 1 and {limits.max_generated_batch}, not {batch_size}."
        )
    schedules = schedules or schedules_of(model)
    return _generate(
        model,
        requests,
        batch_size,
        schedules,
        dict(text or {}),
        on_step=on_step,
        on_latents=on_latents,
    )


def _generate(
    model: DiffusionModel,
    requests: Sequence[SamplingRequest],
    batch_size: int,
    schedules: Schedules,
    text: dict[str, Tensor],
    *,
    on_step: Callable[[int, int], None] | None,
    on_latents: Callable[[Tensor], None],
) -> Iterator[np.ndarray | None]:
    total = count_steps(model, requests, batch_size=batch_size)
    done = 0

    def stepped() -> None:
        nonlocal done
        done += 1
        if on_step is not None:
            on_step(done, total)

    for batch in _batches(model, requests, batch_size):
        for latents in _denoise(model, batch, schedules, text, stepped):
            on_latents(latents)
            # Decode one picture at a time: that takes more memory than a step of several.
            yield _decode(model, latents)


def count_steps(
    model: DiffusionModel, requests: Sequence[SamplingRequest], *, batch_size: int = 4
) -> int:
    """Return how many U-Net calls `generate` will make: the `total` passed to on_step."""
    calls: dict[int, int] = {}
    total = 0
    for batch in _batches(model, requests, batch_size):
        steps = batch[0].num_inference_steps
        if steps not in calls:
            calls[steps] = len(timesteps_of(sampling_scheduler(model), steps))
        total += calls[steps]
    return total


def sampling_facts(model: DiffusionModel) -> SamplingFacts:
    """Return the facts of a model in memory that `check` and `picture_size` need."""
    return facts_from(
        resolution=model.resolution,
        vae_scale_factor=model.vae_scale_factor,
        scheduler_class=model.scheduler_class,
        scheduler_config=model.scheduler_config,
    )


def text_rows(
    model: DiffusionModel, requests: Sequence[SamplingRequest], text: dict[str, Tensor]
) -> TextRows:
    """Gather the text of a batch; encode strings that `text` lacks, and add them to it."""
    guided = [i for i, request in enumerate(requests) if request.guided]
    strings = [requests[i].negative_prompt for i in guided]
    strings += [request.prompt for request in requests]
    for string in strings:
        if string not in text:
            # Encode it alone: a prompt's encoding must not depend on the others of a batch.
            text[string] = encode_text(model, tokenize(model, [string]))
    hidden = [text[string].to(device=model.device, dtype=model.unet.dtype) for string in strings]
    scales = [requests[i].guidance_scale for i in guided]
    return TextRows(
        encoder_hidden_states=torch.stack([h.reshape(-1, h.shape[-1]) for h in hidden]),
        guided=torch.tensor(guided, dtype=torch.int64, device=model.device),
        guidance_scale=torch.tensor(scales, device=model.device).reshape(-1, 1, 1, 1),
    )


def schedules_of(model: DiffusionModel) -> Schedules:
    """Return the schedules of a model's own noise scheduler, for `start`."""
    return Schedules(lambda: sampling_scheduler(model))


def start(model: DiffusionModel, request: SamplingRequest, schedules: Schedules) -> Trajectory:
    """Return a picture at its first step, with initial noise from its own seed."""
    width, height = picture_size(sampling_facts(model), request)
    cells = height // model.vae_scale_factor, width // model.vae_scale_factor
    schedule = schedules.take(request.num_inference_steps, eta=request.eta)
    generator = torch.Generator("cpu").manual_seed(request.seed)
    noise = randn_tensor(
        (1, model.latent_channels, *cells),
        generator=[generator],
        device=model.device,
        dtype=model.unet.dtype,
    )
    return Trajectory(schedule, noise.float() * schedule.template.init_noise_sigma, generator)


def _batches(
    model: DiffusionModel, requests: Sequence[SamplingRequest], batch_size: int
) -> Iterator[list[SamplingRequest]]:
    """Split the requests, in order, into batches of pictures that take their steps together."""

    facts = sampling_facts(model)

    def key(request: SamplingRequest) -> tuple[int, tuple[int, int]]:
        return request.num_inference_steps, picture_size(facts, request)

    batch: list[SamplingRequest] = []
    for request in requests:
        if batch and (len(batch) == batch_size or key(batch[0]) != key(request)):
            yield batch
            batch = []
        batch.append(request)
    if batch:
        yield batch


@torch.no_grad()
def _denoise(
    model: DiffusionModel,
    batch: Sequence[SamplingRequest],
    schedules: Schedules,
    text: dict[str, Tensor],
    stepped: Callable[[], None],
) -> list[Tensor]:
    """Return the clean latents of one batch, float32 [1, C, h, w] each."""
    try:
        with _evaluating(model.text_encoder, model.unet):
            rows = text_rows(model, batch, text)
            pictures = [start(model, request, schedules) for request in batch]
            while not pictures[0].finished:
                advance(model.unet, pictures, rows)
                stepped()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        width, height = picture_size(sampling_facts(model), batch[0])
        knob = "batch_size" if len(batch) > 1 else "width and height"
        raise ResourceError(
            f"The device ran out of memory while sampling {len(batch)} picture(s) of {width} x "
            f"{height} pixels at once; lower {knob}."
        ) from error
    return [picture.latents for picture in pictures]


@torch.no_grad()
def _decode(model: DiffusionModel, latents: Tensor) -> np.ndarray | None:
    """Return the picture of latents [1, C, h, w]; None if latents or pixels are not finite."""
    try:
        with _evaluating(model.vae):
            pictures = decode(model, latents)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError(
            "The device ran out of memory while decoding one picture; lower width and height."
        ) from error
    return None if pictures is None else pictures[0]


@contextmanager
def _evaluating(*modules: torch.nn.Module | None) -> Iterator[None]:
    """Hold the modules in eval mode (no dropout), then restore the mode of every submodule."""
    present = [module for module in modules if module is not None]
    training = [part for module in present for part in module.modules() if part.training]
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True
