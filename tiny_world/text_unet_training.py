"""Pre-train the embedded model's text encoder and U-Net together, on latents of drawn pictures.

The U-Net predicts noise under the noise schedule of Stable Diffusion 2.1 base (`NOISE_SCHEDULE`).
Three measures make such a short training work:

- A linear probe on the text encoder must predict which tokens a caption contains, in place of
  CLIP's own pre-training.
- More of the timesteps are noisy ones (t = 1000 u^0.7).
- The squared error at high noise, where large shapes are decided, has up to eight times the weight
  (1 + 1/SNR, capped; without the cap this is the error of v-prediction).

The result is a moving average of the weights.
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

from tiny_world.lr_schedule import TimedLrSchedule

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
    """The sizes and training settings of text encoder and U-Net."""

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
    """The training set as latent posteriors, with the token ids of several captions each.

    means, stds: float16 [N,4,h,w], unscaled. input_ids: int16 [N,captions,L]. unnamed: the number
    of pictures without a named individual, which come first.
    """

    means: Tensor
    stds: Tensor
    input_ids: Tensor
    unnamed: int
    scaling_factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFacts:
    """The properties of the tokenizer on which the text encoder depends."""

    size: int
    begin: int
    end: int
    max_length: int


class Trained(nn.Module):
    """The two networks that are trained together, and the probe, which is not exported."""

    def __init__(
        self, settings: TextUnetSettings, vocabulary: TokenizerFacts, latent_size: int
    ) -> None:
        super().__init__()
        self.text_encoder = build_text_encoder(settings, vocabulary)
        self.unet = build_unet(settings, latent_size)
        self.probe = nn.Linear(settings.text_width, vocabulary.size)


def build_text_encoder(settings: TextUnetSettings, vocabulary: TokenizerFacts) -> Any:
    """Return a new, random transformers.CLIPTextModel."""
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
    """Return a new, random diffusers.UNet2DConditionModel of two levels.

    It has cross-attention on the lower level and in the middle.
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
    """Return random timesteps 0..999, t = 1000 u^power; a power below 1 favours noisy ones."""
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    return (1000 * uniform**power).long().clamp(max=999)


def timestep_weights(alphas_cumprod: Tensor, cap: float) -> Tensor:
    """Return 1 + 1/SNR of each timestep, capped, float32 [1000].

    SNR = a/(1-a), so 1 + 1/SNR = 1/a.
    """
    return (1.0 / alphas_cumprod).clamp(max=cap).float()


def probe_loss(
    probe: nn.Linear, encoded: Tensor, input_ids: Tensor, vocabulary: TokenizerFacts
) -> Tensor:
    """Return the binary cross-entropy of the probe.

    From the end token on, every position must predict which tokens the caption contains.
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
    """Return random row numbers of one batch, a fixed share of them of named individuals."""
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
    vocabulary: TokenizerFacts,
) -> tuple[Tensor, Tensor]:
    """Return (weighted noise-prediction loss, probe loss) of one random batch."""
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
    """Return the cumulative alphas of the noise schedule, float32 [1000]."""
    start, end = NOISE_SCHEDULE["beta_start"] ** 0.5, NOISE_SCHEDULE["beta_end"] ** 0.5
    betas = torch.linspace(start, end, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0).float()


def train(
    data: LatentSet,
    settings: TextUnetSettings,
    vocabulary: TokenizerFacts,
    *,
    seconds: float,
    seed: int,
    checkpoint: Path,
) -> tuple[Trained, int, float]:
    """Train until the time is spent, resuming from `checkpoint` if it exists.

    Returns (moving average, steps, smoothed loss).
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
    schedule = TimedLrSchedule(seconds, settings.learning_rate, spent_s=spent)
    saved_at = spent
    over = schedule.time_is_up
    while not over:
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate()
        diffusion, probing = losses(model, data, settings, alphas, vocabulary)
        optimizer.zero_grad(set_to_none=True)
        (diffusion + settings.probe_weight * probing).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(settings.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        step += 1
        over = schedule.time_is_up  # read once, so that the last step is saved before the loop ends
        value = diffusion.item()
        smooth = value if step == 1 else 0.99 * smooth + 0.01 * value
        if step % 50 == 0:
            logger.info(
                "text and U-Net: step %d, %.0f of %.0f s, loss %.4f, probe %.4f",
                *(step, schedule.spent_s, seconds, smooth, probing.item()),
            )
        if schedule.spent_s - saved_at > settings.checkpoint_seconds or over:
            saved_at = schedule.spent_s
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
