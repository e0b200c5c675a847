"""Pre-train the embedded model's VAE on drawn pictures: 64x64x3 pixels -> 16x16x4 latents and back.

Loss = L1 + 0.3 x L1 of the pixel differences to the right and below (edges) + a small KL term per
latent element. Training begins on 32x32 crops, with half as many pixels in a step, and ends on
whole pictures, because group norms and the middle attention behave differently at the full size.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from tiny_world.lr_schedule import TimedLrSchedule

logger = logging.getLogger(__name__)
Pictures = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeSettings:
    """The size and training settings of the VAE."""

    channels: tuple[int, ...] = (16, 32, 64)
    groups: int = 8
    latent_channels: int = 4
    learning_rate: float = 2e-3
    kl_weight: float = 2e-4
    crop_share: float = 0.5
    crop: int = 32
    crop_batch: int = 16
    whole_batch: int = 8


def build(settings: VaeSettings, resolution: int) -> Any:
    """Return a new, random diffusers.AutoencoderKL with one layer per block."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(settings.channels),
        up_block_types=("UpDecoderBlock2D",) * len(settings.channels),
        block_out_channels=settings.channels,
        layers_per_block=1,
        latent_channels=settings.latent_channels,
        norm_num_groups=settings.groups,
        sample_size=resolution,
    )


def to_pixels(pictures: Pictures) -> Tensor:
    """Convert uint8 [B,H,W,3], 0..255, to float32 [B,3,H,W], -1..1."""
    return torch.tensor(pictures).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def loss(vae: Any, pixels: Tensor, kl_weight: float) -> Tensor:
    """Return the training loss of one batch (float32 scalar), with one sample of the posterior."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moments = vae.quant_conv(vae.encoder(pixels)).float()
        mean, log_variance = moments.chunk(2, dim=1)
        log_variance = log_variance.clamp(-30, 20)
        latents = mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)
        decoded = vae.decoder(vae.post_quant_conv(latents)).float()
    kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
    edges = functional.l1_loss(decoded.diff(dim=2), pixels.diff(dim=2)) + functional.l1_loss(
        decoded.diff(dim=3), pixels.diff(dim=3)
    )
    total: Tensor = functional.l1_loss(decoded, pixels) + 0.3 * edges + kl_weight * kl
    return total


def _batch(
    pictures: Pictures, settings: VaeSettings, cropped: bool, rng: np.random.Generator
) -> Tensor:
    size = settings.crop if cropped else pictures.shape[1]
    count = settings.crop_batch if cropped else settings.whole_batch
    chosen = rng.integers(len(pictures), size=count)
    tops, lefts = rng.integers(pictures.shape[1] - size + 1, size=(2, count))
    crops = [
        pictures[index, top : top + size, left : left + size]
        for index, top, left in zip(chosen, tops, lefts, strict=True)
    ]
    return to_pixels(np.stack(crops))


def train(
    pictures: Pictures, settings: VaeSettings, *, seconds: float, seed: int, checkpoint: Path
) -> tuple[Any, int]:
    """Train until the time is spent, resuming from `checkpoint` if it exists.

    Returns (VAE, steps).
    """
    torch.manual_seed(seed)
    vae = build(settings, pictures.shape[1])
    vae.train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=settings.learning_rate, weight_decay=1e-3)
    step, spent = 0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        vae.load_state_dict(saved["vae"])
        optimizer.load_state_dict(saved["optimizer"])
        step, spent = saved["step"], saved["spent"]
    rng = np.random.default_rng((seed, step))
    torch.manual_seed(seed + step)
    schedule = TimedLrSchedule(seconds, settings.learning_rate, spent_s=spent)
    saved_at, smooth = spent, 0.0
    over = schedule.time_is_up
    while not over:
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate()
        value = loss(
            vae,
            _batch(pictures, settings, schedule.share < settings.crop_share, rng),
            settings.kl_weight,
        )
        optimizer.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        over = schedule.time_is_up  # read once, so that the last step is saved before the loop ends
        smooth = value.item() if step == 1 else 0.98 * smooth + 0.02 * value.item()
        if step % 100 == 0:
            logger.info("vae step %d, %.0f s, loss %.4f", step, schedule.spent_s, smooth)
        if schedule.spent_s - saved_at > 120 or over:
            saved_at = schedule.spent_s
            _save(checkpoint, vae, optimizer, step, saved_at)
    vae.eval()
    return vae, step


def _save(path: Path, vae: Any, optimizer: torch.optim.Optimizer, step: int, spent: float) -> None:
    partial = path.with_suffix(".partial")
    state = {
        "vae": vae.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "spent": spent,
    }
    torch.save(state, partial)
    partial.replace(path)


@torch.no_grad()
def encode(vae: Any, pictures: Pictures, batch: int = 128) -> tuple[Tensor, Tensor]:
    """Return posterior means and standard deviations, unscaled, float16 [N,4,h,w] each."""
    means, stds = [], []
    for start in range(0, len(pictures), batch):
        posterior = vae.encode(to_pixels(pictures[start : start + batch])).latent_dist
        means.append(posterior.mean.half())
        stds.append(posterior.std.half())
    return torch.cat(means), torch.cat(stds)


@torch.no_grad()
def reconstruct(vae: Any, pictures: Pictures) -> Pictures:
    """Encode pictures, decode the posterior mean and return the result, uint8."""
    decoded = vae.decode(vae.encode(to_pixels(pictures)).latent_dist.mean).sample
    pixels = decoded.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    result: Pictures = pixels.permute(0, 2, 3, 1).numpy()
    return result


def psnr(first: Pictures, second: Pictures) -> float:
    """Return the peak signal-to-noise ratio in dB over all pictures together."""
    error = np.mean((first.astype(np.float64) - second.astype(np.float64)) ** 2)
    return float(10 * np.log10(255.0**2 / error))
