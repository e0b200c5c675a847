"""The training loop, one page: when does what happen to the weights.

Legend: B pictures of a micro-batch, C latent channels, h w latent cells, L tokens, D text width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from dreambooth.data import pairs
from dreambooth.data.cache import LatentPosteriors
from dreambooth.diffusion.loss import dreambooth_loss, noise_target
from dreambooth.hyperparameters import Hyperparameters
from dreambooth.training import gradients as step_gradients
from dreambooth.training import lr_schedulers, readings
from dreambooth.training.graphed_passes import GraphedPasses, Record, by_calling
from dreambooth.training.master_weights import MasterWeights
from dreambooth.training.plan import TrainingPlan
from dreambooth.training.readings import StepMetrics, Unread, refuse_not_finite
from dreambooth.training.state import TrainingState

MAX_SKIPPED_IN_A_ROW = 25  # fp16 loss scaling starts at 2^16: this many halvings end below 1


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
    record: Record = by_calling,
) -> Iterator[StepMetrics]:
    """Train until plan.steps, yielding after each step: time to report, sample and save.

    With plan.fast_step the metrics of several steps come one after the other once all of them are
    made: sample and save where metrics.step is state.step. record: of the fast step's passes.
    encode_text: token ids [B,L] -> encoder_hidden_states [B,L,D], used where the text encoder is
    trained. prior_unet: the frozen base model, whose prediction is the class target
    (prior_preservation_mode=prediction). Raises TrainingDivergedError.
    """
    precision, max_grad_norm = state.precision, hyperparameters.max_grad_norm
    gradients, unet = step_gradients.of(plan, state, max_grad_norm), state.unet
    autocast: Callable[[], AbstractContextManager[Any]] = precision.autocast
    if plan.fast_step:
        gradients = masters = MasterWeights(state, max_grad_norm)
        unet, autocast = masters.unet, nullcontext
    networks = accelerator.prepare(TrainedNetworks(unet, state.text_encoder, encode_text))

    def one_pass(
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        text: torch.Tensor,
        target: torch.Tensor,
    ) -> torch.Tensor:
        """A micro-batch forward and backward; losses [3]: all, the instance's, the class's."""
        with autocast():
            model_pred = networks(noisy_latents, timesteps, text)
        losses = dreambooth_loss(
            model_pred,
            target,
            instances=plan.batch_size,
            prior_loss_weight=hyperparameters.prior_loss_weight,
        )
        precision.backward(losses.total / plan.gradient_accumulation_steps)
        class_loss = torch.zeros_like(losses.total) if losses.class_ is None else losses.class_
        return torch.stack((losses.total, losses.instance, class_loss)).detach()

    run_pass = one_pass
    if plan.fast_step:
        run_pass = GraphedPasses(one_pass, list(unet.parameters()), record)

    def passes() -> torch.Tensor:
        """The micro-batches of the state's step, forward and backward; means of the losses [3]."""
        sums = torch.zeros(3, device=accelerator.device)
        # Accumulate gradients: every window has the same number of micro-batches
        for micro_batch in range(plan.gradient_accumulation_steps):
            samples = pairs.sample_numbers(
                step=state.step,
                micro_batch=micro_batch,
                batch_size=plan.batch_size,
                micro_batches=plan.gradient_accumulation_steps,
                process=accelerator.process_index,
                processes=accelerator.num_processes,
            )
            with precision.autocast():
                batch = make_micro_batch(
                    data, samples, noise_scheduler, hyperparameters.seed, prior_unet
                )
            sums += run_pass(batch.noisy_latents, batch.timesteps, batch.text, batch.target)
        return sums / plan.gradient_accumulation_steps

    is_read = readings.rhythm(state, plan, hyperparameters)
    unread: list[Unread] = []
    skipped_in_a_row = 0

    while state.step < plan.steps:
        # Set the learning rate
        learning_rate = hyperparameters.learning_rate * lr_schedulers.factor(
            hyperparameters.lr_scheduler,
            state.step,
            steps=plan.steps,
            warmup_steps=plan.lr_warmup_steps,
            learning_rate=hyperparameters.learning_rate,
        )
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate

        # Forward and backward passes; clip by global norm, update the weights
        losses = accelerator.reduce(gradients.collect(passes), "mean")
        step = state.step + 1
        unread.append(Unread(step, learning_rate, losses, gradients.norm()))
        read: list[StepMetrics] = []
        if is_read(step):
            read = readings.read(unread, state, plan, with_class=data.class_text is not None)
            unread.clear()
        updated = gradients.update(passes)  # runs them again where gradients were not kept
        if not updated:  # fp16 overflow: the scale is lower now, the same step is tried again
            state.skipped_steps += 1
            skipped_in_a_row += 1
            if skipped_in_a_row > MAX_SKIPPED_IN_A_ROW:
                refuse_not_finite(replace(read[-1], grad_norm=math.nan), state, force=True)
            continue
        skipped_in_a_row = 0
        state.step = step
        for metrics in read:
            state.loss_total += metrics.loss
        yield from read


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
