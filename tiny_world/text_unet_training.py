"""Pre-training of the embedded model's text encoder and U-Net, together, on latents of drawn
pictures.

Noise prediction under the noise schedule of Stable Diffusion 2.1 base (`NOISE_SCHEDULE`). Three
measures make so short a training work: a linear probe on the text encoder must tell which tokens a
caption holds (the stand-in for CLIP's own pre-training); timesteps lean towards noise (t = 1000
u^0.7); and the squared error at high noise, where large shapes are decided, weighs up to eight
times as much (1 + 1/SNR, capped: for uncapped weights this is the error of v-prediction). A moving
average of the weights is what comes out.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tiny_world.pace import Pace

logger = logging.getLogger(__name__)

NOISE_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}
"""PNDMScheduler settings of Stable Diffusion 2.1 base (`clip_sample` false is added on export)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextUnetSettings:
    """Sizes and training of text encoder and U-Net."""

    text_width: int = 96
    text_layers: int = 3
    text_heads: int = 4
    channels: tuple[int, int] = (64, 144)
    heads: int = 4
    groups: int = 16
    batch: int = 32
    named_per_batch: int = 12
    learning_rate: float = 1e-3
    probe_weight: float = 0.2
    timestep_power: float = 0.7
    weight_cap: float = 8.0
    ema_decay: float = 0.999
    checkpoint_seconds: float = 150.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSet:
    """The training set in latents: posterior means and deviations, and the token ids of several
    captions each.

    means, stds: float16 [N,4,h,w], unscaled; input_ids: int16 [N,captions,L]. The first `unnamed`
    rows are pictures of anybody, the rest are of named individuals.
    """

    means: Tensor
    stds: Tensor
    input_ids: Tensor
    unnamed: int
    scaling_factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What of the tokenizer the text encoder must know."""

    size: int
    begin: int
    end: int
    max_length: int


class Trained(nn.Module):
    """The two networks that are trained together, and the probe that is thrown away."""

    def __init__(
        self, settings: TextUnetSettings, vocabulary: Vocabulary, latent_size: int
    ) -> None:
        super().__init__()
        self.text_encoder = build_text_encoder(settings, vocabulary)
        self.unet = build_unet(settings, latent_size)
        self.probe = nn.Linear(settings.text_width, vocabulary.size)


def build_text_encoder(settings: TextUnetSettings, vocabulary: Vocabulary) -> Any:
    """A fresh transformers.CLIPTextModel."""
    from transformers import CLIPTextConfig, CLIPTextModel

    configuration = CLIPTextConfig(
        vocab_size=vocabulary.size,
        hidden_size=settings.text_width,
        intermediate_size=settings.text_width * 4,
        projection_dim=settings.text_width,
        num_hidden_layers=settings.text_layers,
        num_attention_heads=settings.text_heads,
        max_position_embeddings=vocabulary.max_length,
        bos_token_id=vocabulary.begin,
        eos_token_id=vocabulary.end,
        pad_token_id=vocabulary.end,
    )
    return CLIPTextModel(configuration)


def build_unet(settings: TextUnetSettings, latent_size: int) -> Any:
    """A fresh diffusers.UNet2DConditionModel of two levels, cross-attention on the lower one and in
    the middle.
    """
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=settings.channels,
        layers_per_block=1,
        norm_num_groups=settings.groups,
        cross_attention_dim=settings.text_width,
        attention_head_dim=settings.heads,
    )


def draw_timesteps(count: int, power: float, generator: torch.Generator | None = None) -> Tensor:
    """Timesteps 0..999 that lean towards noise: t = 1000 u^power, never 1000 by rounding."""
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    return (1000 * uniform**power).long().clamp(max=999)


def timestep_weights(alphas_cumprod: Tensor, cap: float) -> Tensor:
    """1 + 1/SNR per timestep, capped: float32 [1000]. SNR = a/(1-a), so 1 + 1/SNR = 1/a."""
    return (1.0 / alphas_cumprod).clamp(max=cap).float()


def probe_loss(
    probe: nn.Linear, encoded: Tensor, input_ids: Tensor, vocabulary: Vocabulary
) -> Tensor:
    """Binary cross-entropy: from the end mark on, every position must tell which tokens the caption
    holds.
    """
    holds = torch.zeros(len(input_ids), vocabulary.size).scatter_(1, input_ids, 1.0)
    holds[:, [vocabulary.begin, vocabulary.end]] = 0.0
    used = functional.binary_cross_entropy_with_logits(
        probe(encoded.float()),
        holds[:, None].expand(-1, input_ids.shape[1], -1),
        reduction="none",
    ).sum(dim=-1)
    after_end = input_ids == vocabulary.end
    return (used * after_end).sum() / after_end.sum() / 20.0


def choose_rows(data: LatentSet, settings: TextUnetSettings) -> Tensor:
    """Row numbers of one batch: a fixed share of named individuals."""
    named = settings.named_per_batch if len(data.means) > data.unnamed else 0
    anybody = torch.randint(data.unnamed, (settings.batch - named,))
    if not named:
        return anybody
    return torch.cat([anybody, torch.randint(data.unnamed, len(data.means), (named,))])


def losses(
    model: Trained,
    data: LatentSet,
    settings: TextUnetSettings,
    alphas: Tensor,
    vocabulary: Vocabulary,
) -> tuple[Tensor, Tensor]:
    """(weighted noise-prediction loss, probe loss) of one random batch."""
    rows = choose_rows(data, settings)
    means, stds = data.means[rows].float(), data.stds[rows].float()
    latents = (means + stds * torch.randn_like(means)) * data.scaling_factor
    captions = torch.randint(data.input_ids.shape[1], (len(rows),))
    input_ids = data.input_ids[rows, captions].long()
    timesteps = draw_timesteps(len(rows), settings.timestep_power)
    noise = torch.randn_like(latents)
    alpha = alphas[timesteps].view(-1, 1, 1, 1)
    noisy_latents = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    with torch.autocast("cpu", dtype=torch.bfloat16):
        encoded = model.text_encoder(input_ids).last_hidden_state
        predicted = model.unet(noisy_latents, timesteps, encoded).sample
    error = (predicted.float() - noise).square().mean(dim=(1, 2, 3))
    weights = timestep_weights(alphas, settings.weight_cap)
    diffusion = (error * weights[timesteps]).mean() / weights.mean()
    return diffusion, probe_loss(model.probe, encoded, input_ids, vocabulary)


def alphas_cumprod() -> Tensor:
    """The cumulative alphas of the noise schedule, float32 [1000]."""
    start, end = NOISE_SCHEDULE["beta_start"] ** 0.5, NOISE_SCHEDULE["beta_end"] ** 0.5
    betas = torch.linspace(start, end, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0).float()


def train(
    data: LatentSet,
    settings: TextUnetSettings,
    vocabulary: Vocabulary,
    *,
    seconds: float,
    seed: int,
    checkpoint: Path,
) -> tuple[Trained, int, float]:
    """Trains until the time is spent, going on from `checkpoint`; (moving average, steps, smoothed
    loss).
    """
    torch.manual_seed(seed)
    model = Trained(settings, vocabulary, data.means.shape[-1])
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=1e-2)
    step, spent, smooth = 0, 0.0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        step, spent, smooth = saved["step"], saved["spent"], saved["smooth"]
    torch.manual_seed(seed + step)
    model.train()
    alphas = alphas_cumprod()
    pace = Pace(seconds, settings.learning_rate, spent=spent)
    saved_at = spent
    over = pace.over
    while not over:
        for group in optimizer.param_groups:
            group["lr"] = pace.learning_rate()
        diffusion, probing = losses(model, data, settings, alphas, vocabulary)
        optimizer.zero_grad(set_to_none=True)
        (diffusion + settings.probe_weight * probing).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(settings.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        step += 1
        over = pace.over  # read once: whoever ends the loop has saved
        value = diffusion.item()
        smooth = value if step == 1 else 0.99 * smooth + 0.01 * value
        if step % 50 == 0:
            logger.info(
                "text and U-Net: step %d, %.0f of %.0f s, loss %.4f, probe %.4f",
                *(step, pace.spent, seconds, smooth, probing.item()),
            )
        if pace.spent - saved_at > settings.checkpoint_seconds or over:
            saved_at = pace.spent
            state = {
                "model": model.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
                **{"step": step, "spent": saved_at, "smooth": smooth},
            }
            torch.save(state, checkpoint.with_suffix(".partial"))
            checkpoint.with_suffix(".partial").replace(checkpoint)
    average.eval()
    return average, step, smooth
