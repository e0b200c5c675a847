"""DreamBooth (Ruiz et al. 2022) as a plain fp32 loop that encodes everything at every step.

It shares only `sample_draws.draw` with the training code, so that both see the same pictures,
timesteps and noise.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from dreambooth.data import sample_draws
from dreambooth.diffusion import model as models
from dreambooth.settings.hyperparameters import Hyperparameters

INSTANCE, CLASS = "a photo of riobugger cat", "a photo of cat"


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """A model whose latents are [4,16,16], and pictures of 32 x 32 pixels."""

    model: models.DiffusionModel
    instances: Sequence[Path]
    classes: Sequence[Path]


@dataclass(frozen=True, slots=True, kw_only=True)
class Half:
    """One term of the loss.

    frozen: its target is the frozen base model's prediction, not the noise.
    """

    stream: str
    paths: Sequence[Path]
    prompt: str
    weight: float
    frozen: bool = False


def trained_copies(world: World, settings: Hyperparameters) -> nn.ModuleDict:
    """Return copies of the trained networks as they are before training."""
    parts = {"unet": world.model.unet}
    if settings.train_text_encoder:
        parts["text_encoder"] = world.model.text_encoder
    copies = {name: copy.deepcopy(part) for name, part in parts.items()}
    return nn.ModuleDict(copies).requires_grad_(True).train()


def train(world: World, trained: nn.ModuleDict, settings: Hyperparameters) -> None:
    """Train the networks of `trained_copies` for settings.max_steps steps."""
    base, accumulation = world.model, settings.gradient_accumulation_steps
    text_encoder = dict(trained.items()).get("text_encoder", base.text_encoder)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alpha_bar = torch.cumprod(1 - betas, dim=0)
    adamw = _adamw(trained, settings)
    assert settings.max_steps is not None
    for window in range(settings.max_steps * accumulation):
        numbers = range(window * settings.batch_size, (window + 1) * settings.batch_size)
        for half in _halves(world, settings):
            drawn = sample_draws.draw(
                numbers,
                seed=settings.seed,
                stream=half.stream,
                crop_counts=[1] * len(half.paths),
                latent_shape=(4, 16, 16),
                train_timesteps=1000,
            )
            latents = _latents(base, [half.paths[int(i)] for i in drawn.images], drawn)
            a = alpha_bar[drawn.timesteps][:, None, None, None]
            noisy = a.sqrt() * latents + (1 - a).sqrt() * drawn.noise
            prompts = [half.prompt] * len(numbers)
            scale = settings.training_guidance_scale
            if half.frozen and scale > 1:  # every other picture holds the empty prompt
                prompts = ["" if number % 2 else half.prompt for number in numbers]
            target = drawn.noise
            with torch.no_grad():
                if half.frozen:
                    text = _text(base, base.text_encoder, prompts)
                    target = base.unet(noisy, drawn.timesteps, text).sample
                elif scale > 1:  # so that empty + scale * (target - empty) is the noise
                    text = _text(base, base.text_encoder, [""] * len(numbers))
                    empty = base.unet(noisy, drawn.timesteps, text).sample
                    target = drawn.noise / scale + empty * (1 - 1 / scale)
            with torch.set_grad_enabled(settings.train_text_encoder):
                text = _text(base, text_encoder, prompts)
            predicted = trained["unet"](noisy, drawn.timesteps, text).sample
            loss = half.weight * ((predicted - target) ** 2).mean()
            (loss / accumulation).backward()
        if (window + 1) % accumulation == 0:
            gradients = [p.grad for p in trained.parameters()]
            norm = torch.stack([(gradient**2).sum() for gradient in gradients]).sum().sqrt()
            for gradient in gradients:
                gradient *= min(1.0, float(settings.max_grad_norm / norm))
            adamw.step()
            adamw.zero_grad()


def _halves(world: World, settings: Hyperparameters) -> list[Half]:
    halves = [Half(stream="instance", paths=world.instances, prompt=INSTANCE, weight=1.0)]
    if settings.with_prior_preservation:
        by_prediction = settings.prior_preservation_mode == "prediction"
        halves.append(
            Half(  # a prediction is made of the same noisy latents as the instance half's
                stream="instance" if by_prediction else "class",
                paths=world.instances if by_prediction else world.classes,
                prompt=CLASS,
                weight=settings.prior_loss_weight,
                frozen=by_prediction,
            )
        )
    return halves


def _adamw(trained: nn.Module, settings: Hyperparameters) -> torch.optim.Optimizer:
    no_decay = {
        id(p)
        for module in trained.modules()
        for name, p in module.named_parameters(recurse=False)
        if name == "bias" or isinstance(module, nn.LayerNorm)
    }
    decayed = [p for p in trained.parameters() if id(p) not in no_decay]
    exempt = [p for p in trained.parameters() if id(p) in no_decay]
    return torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": settings.adam_weight_decay},
            {"params": exempt, "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        foreach=False,
        fused=False,
    )


@torch.no_grad()
def _latents(
    model: models.DiffusionModel, paths: Sequence[Path], drawn: sample_draws.SampleDraws
) -> torch.Tensor:
    pictures = [Image.open(path).convert("RGB") for path in paths]
    pixels = torch.stack(
        [torch.tensor(np.array(picture)).permute(2, 0, 1) / 127.5 - 1 for picture in pictures]
    )
    posterior = model.vae.encode(pixels).latent_dist
    latents = posterior.mean + posterior.std * drawn.posterior_noise
    return latents * model.vae.config.scaling_factor


def _text(
    model: models.DiffusionModel, text_encoder: nn.Module, prompts: list[str]
) -> torch.Tensor:
    ids = model.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    text: torch.Tensor = text_encoder(ids)[0]
    return text
