"""Measure whether pictures are clean, by how well the base model can take noise out of them.

A model knows how to finish what its own world can show. Where a picture is burnt, broken or smeared
the base model's prediction of the noise is off, and most in the worst places. Nothing is asked of
the fine-tuned model, so that what it has unlearned cannot hide.

Legend: N pictures, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dreambooth.diffusion import model as models
from dreambooth.diffusion.loss import noise_target
from dreambooth.diffusion.model import DiffusionModel
from dreambooth.evaluation.features import Picture
from dreambooth.evaluation.measures import Values

CLEAN_WITHIN = 0.5
"""A clean picture's loss is at most exp(0.5) = 1.65 times that of the base model's own drawings."""

_TIMES = (0.03, 0.06, 0.1)  # of all timesteps: noise that hides details and leaves shapes
_NOISES = 4
_WORST = 0.1  # of the latent cells


@torch.no_grad()
def denoising_loss(base: DiffusionModel, pictures: Sequence[Picture]) -> Values:
    """Return [N] the logarithm of the base model's denoising loss on each picture [H,W,3].

    The squared error of its prediction (Ho et al. 2020, equation 14) for the empty prompt, as a
    mean over channels and twelve fixed draws of low noise, then over the worst tenth of the cells.
    """
    scheduler = models.training_noise_scheduler(base)
    device, dtype = base.unet.device, base.unet.dtype
    text = models.encode_text(base, models.tokenize(base, [""])).to(device, dtype)
    generator = torch.Generator()
    count = scheduler.config.num_train_timesteps
    timesteps = torch.tensor([int(part * count) for part in _TIMES]).repeat_interleave(_NOISES)
    found = []
    for picture in pictures:
        pixels = torch.tensor(picture).permute(2, 0, 1)[None] / 127.5 - 1
        mean, _ = models.encode_posterior(base, pixels)
        latents = (mean * base.vae.config.scaling_factor).cpu().float()
        generator.manual_seed(0)
        noise = torch.randn((_NOISES, *latents.shape[1:]), generator=generator)
        noise = noise.repeat(len(_TIMES), 1, 1, 1)
        latents = latents.expand_as(noise)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        target = noise_target(scheduler, latents, noise, timesteps)
        predicted = base.unet(
            noisy.to(device, dtype),
            timesteps.to(device),
            text.expand(len(noise), -1, -1),
        ).sample
        cells = ((predicted.cpu().float() - target) ** 2).mean(dim=(0, 1)).flatten()  # [h*w]
        worst = cells.topk(max(1, round(_WORST * len(cells)))).values
        found.append(float(worst.mean().log()))
    return np.array(found)


def clean(losses: Values, own: Values) -> Values:
    """Return [N] 1 where a picture is clean, 0 elsewhere.

    losses: `denoising_loss` of the pictures. own: of the base model's own drawings.
    """
    within: Values = (losses <= own.mean() + CLEAN_WITHIN).astype(np.float64)
    return within
