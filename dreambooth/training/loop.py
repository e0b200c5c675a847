"""The training loop, one page: when does what happen to the weights.

Legend: B pictures of a micro-batch, C latent channels, h w latent cells, L tokens, D text width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from dreambooth.data import pairs
from dreambooth.data.cache import LatentPosteriors
from dreambooth.diffusion.loss import dreambooth_loss, noise_target
from dreambooth.settings.hyperparameters import Hyperparameters
from dreambooth.training import lr_schedulers
from dreambooth.training.mixed_precision import Precision
from dreambooth.training.optimizer import clip_factor
from dreambooth.training.plan import TrainingPlan
from dreambooth.training.state import TrainingState
from dreambooth.training.step_metrics import StepMetrics, read_metrics, refuse_not_finite

MAX_SKIPPED_IN_A_ROW = 25  # fp16 loss scaling starts at 2^16: so many halvings end below 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """All that the loop reads, on the training device.

    instance, class_: latent posteriors; class_ is None without class images. instance_text,
    class_text: encoder_hidden_states [1,L,D], or token ids [1,L] where the text encoder is trained.
    prior_text: encoder_hidden_states [1,L,D] of the class prompt as the frozen base model has them.
    latent_scale: latents are multiplied by it, as the VAE's scaling_factor says.
    """

    instance: LatentPosteriors
    class_: LatentPosteriors | None
    instance_text: torch.Tensor
    class_text: torch.Tensor | None
    latent_scale: float
    prior_text: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """noisy_latents, target [B,C,h,w]; timesteps [B]; text [B,L,D] or ids [B,L]; instances lead."""

    noisy_latents: torch.Tensor
    timesteps: torch.Tensor
    text: torch.Tensor
    target: torch.Tensor


class TrainedNetworks(nn.Module):
    """All that is trained, as one network: several processes average the gradients of it all."""

    def __init__(
        self,
        unet: nn.Module,
        text_encoder: nn.Module | None,
        encode_text: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder
        self._encode_text = encode_text

    def forward(
        self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor
    ) -> torch.Tensor:
        """The prediction [B,C,h,w]; text as in MicroBatch."""
        if self.text_encoder is not None:
            text = self._encode_text(text)
        return predict(self.unet, noisy_latents, timesteps, text)


def predict(
    unet: nn.Module, noisy_latents: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor
) -> torch.Tensor:
    """model_pred [B,C,h,w]; half weights get half inputs."""
    dtype = next(unet.parameters()).dtype
    if dtype != torch.float32:
        noisy_latents, text = noisy_latents.to(dtype), text.to(dtype)
    model_pred: torch.Tensor = unet(noisy_latents, timesteps, text).sample
    return model_pred


def train(
    state: TrainingState,
    data: TrainingData,
    plan: TrainingPlan,
    hyperparameters: Hyperparameters,
    *,
    noise_scheduler: Any,
    encode_text: Callable[[torch.Tensor], torch.Tensor],
    prior_unet: nn.Module | None = None,
    accelerator: Accelerator,
) -> Iterator[StepMetrics]:
    """Train until plan.steps, yielding after each step: time to report, sample and save.

    encode_text: token ids [B,L] -> encoder_hidden_states [B,L,D], used where the text encoder is
    trained. prior_unet: the frozen base model, whose prediction is the class target
    (prior_preservation_mode=prediction). Raises TrainingDivergedError.

    `freed_gradients.train` and `fast.captured_loop.train` are the same for plans that want them.
    """
    precision, optimizer = state.precision, state.optimizer
    networks = accelerator.prepare(TrainedNetworks(state.unet, state.text_encoder, encode_text))
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    skipped_in_a_row = 0

    while state.step < plan.steps:
        # Set the learning rate
        learning_rate = set_learning_rate(state, plan, hyperparameters)

        # Forward and backward: the gradients of the step's micro-batches add up
        losses = torch.zeros(3, device=accelerator.device)
        for micro_batch in micro_batches(
            state, data, plan, hyperparameters, accelerator, noise_scheduler, prior_unet
        ):
            losses += forward_backward(networks, micro_batch, plan, hyperparameters, precision)
        losses = accelerator.reduce(losses / plan.gradient_accumulation_steps, "mean")

        # Clip the gradients by their global norm
        precision.unscale(optimizer)
        norm = nn.utils.get_total_norm([w.grad for w in weights if w.grad is not None])
        with_class = data.class_text is not None
        metrics = read_metrics(state, plan, losses, norm, learning_rate, with_class=with_class)
        if clip_factor(norm, hyperparameters.max_grad_norm) < 1:  # by 1 would change nothing
            nn.utils.clip_grads_with_norm_(weights, hyperparameters.max_grad_norm, norm)

        # Update the weights, and free the gradients
        updated = precision.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
        if not updated:  # fp16 overflow: the scale is lower now, the same step is tried again
            skipped_in_a_row = count_skipped(state, metrics, skipped_in_a_row)
            continue
        skipped_in_a_row = 0
        state.step += 1
        state.loss_total += metrics.loss
        yield metrics


def set_learning_rate(
    state: TrainingState, plan: TrainingPlan, hyperparameters: Hyperparameters
) -> float:
    """Give the optimizer the learning rate of the state's step, and return it."""
    learning_rate = hyperparameters.learning_rate * lr_schedulers.factor(
        hyperparameters.lr_scheduler,
        state.step,
        steps=plan.steps,
        warmup_steps=plan.lr_warmup_steps,
        learning_rate=hyperparameters.learning_rate,
    )
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate
    return learning_rate


def forward_backward(
    networks: nn.Module,
    micro_batch: MicroBatch,
    plan: TrainingPlan,
    hyperparameters: Hyperparameters,
    precision: Precision,
    *,
    half_weights: bool = False,
) -> torch.Tensor:
    """Add a micro-batch's share to the gradients; return its losses [3]: all, instance, class.

    half_weights: the networks compute in half precision by themselves, without autocast.
    """
    with nullcontext() if half_weights else precision.autocast():
        model_pred = networks(micro_batch.noisy_latents, micro_batch.timesteps, micro_batch.text)
    losses = dreambooth_loss(
        model_pred,
        micro_batch.target,
        instances=plan.batch_size,
        prior_loss_weight=hyperparameters.prior_loss_weight,
    )
    precision.backward(losses.total / plan.gradient_accumulation_steps)
    class_loss = torch.zeros_like(losses.total) if losses.class_ is None else losses.class_
    return torch.stack((losses.total, losses.instance, class_loss)).detach()


def count_skipped(state: TrainingState, metrics: StepMetrics, skipped_in_a_row: int) -> int:
    """Count a step whose fp16 gradients overflowed; return how many there were in a row.

    Raises TrainingDivergedError after too many.
    """
    state.skipped_steps += 1
    if skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
        refuse_not_finite(replace(metrics, grad_norm=math.nan), state, force=True)
    return skipped_in_a_row + 1


def micro_batches(
    state: TrainingState,
    data: TrainingData,
    plan: TrainingPlan,
    hyperparameters: Hyperparameters,
    accelerator: Accelerator,
    noise_scheduler: Any,
    prior_unet: nn.Module | None,
) -> Iterator[MicroBatch]:
    """Yield the micro-batches of the state's step, as many for every step."""
    for number in range(plan.gradient_accumulation_steps):
        samples = pairs.sample_numbers(
            step=state.step,
            micro_batch=number,
            batch_size=plan.batch_size,
            micro_batches=plan.gradient_accumulation_steps,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
        )
        with state.precision.autocast():
            made = make_micro_batch(
                data, samples, noise_scheduler, hyperparameters.seed, prior_unet
            )
        yield made


def make_micro_batch(
    data: TrainingData,
    samples: range,
    noise_scheduler: Any,
    seed: int,
    prior_unet: nn.Module | None,
) -> MicroBatch:
    """Draw pictures, timesteps and noise of both halves; the class half has draws of its own."""
    noisy, timesteps, target = _draw_half(
        data.instance, "instance", data, samples, noise_scheduler, seed
    )
    text = data.instance_text.expand(len(samples), *data.instance_text.shape[1:])
    halves = [(noisy, timesteps, text, target)]
    if data.class_text is not None:
        class_text = data.class_text.expand(len(samples), *data.class_text.shape[1:])
        if prior_unet is not None:
            with torch.no_grad():
                assert data.prior_text is not None  # given with the frozen model
                prior_text = data.prior_text.expand(len(samples), *data.prior_text.shape[1:])
                base_prediction = predict(prior_unet, noisy, timesteps, prior_text)
            halves.append((noisy, timesteps, class_text, base_prediction.to(target.dtype)))
        elif data.class_ is not None:
            noisy, timesteps, target = _draw_half(
                data.class_, "class", data, samples, noise_scheduler, seed
            )
            halves.append((noisy, timesteps, class_text, target))
    return MicroBatch(
        noisy_latents=torch.cat([half[0] for half in halves]),
        timesteps=torch.cat([half[1] for half in halves]),
        text=torch.cat([half[2] for half in halves]),
        target=torch.cat([half[3] for half in halves]),
    )


def _draw_half(
    posteriors: LatentPosteriors,
    stream: str,
    data: TrainingData,
    samples: range,
    noise_scheduler: Any,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(noisy_latents, timesteps, target) of one half."""
    drawn = pairs.draw(
        samples,
        seed=seed,
        stream=stream,
        crops=posteriors.crops,
        latent_shape=posteriors.latent_shape,
        train_timesteps=noise_scheduler.config.num_train_timesteps,
    )
    latents = posteriors.sample(drawn) * data.latent_scale
    noise = pairs.onto(latents.device, drawn.noise)
    timesteps = pairs.onto(latents.device, drawn.timesteps)
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    return noisy_latents, timesteps, noise_target(noise_scheduler, latents, noise, timesteps)
