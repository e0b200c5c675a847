"""The training loop, which shows on one page what happens to the weights, and when.

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

from dreambooth.data import sample_draws
from dreambooth.data.cache import LatentPosteriors
from dreambooth.diffusion.loss import dreambooth_loss, noise_target, squared_errors
from dreambooth.settings.hyperparameters import Hyperparameters
from dreambooth.training import lr_schedulers
from dreambooth.training.mixed_precision import Precision
from dreambooth.training.optimizer import clip_factor
from dreambooth.training.plan import TrainingPlan
from dreambooth.training.state import TrainingState
from dreambooth.training.step_metrics import StepMetrics, read_metrics, refuse_not_finite
from dreambooth.training.subjects_kept import KEPT_WEIGHT

# The fp16 loss scale starts at 2^16 and halves at each overflow: 17 of them end below 1.
MAX_SKIPPED_IN_A_ROW = 25


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """All the data that the loop reads, on the training device.

    instance, class_: latent posteriors; class_ is None without class images. instance_text,
    class_text: encoder_hidden_states [T,L,D] of all distinct prompts, or token ids [T,L] where the
    text encoder is trained. prior_text: encoder_hidden_states [T,L,D] of the class prompts from the
    frozen base model. empty_text, prior_empty_text: [1,L,D], the same two of the empty prompt,
    where the frozen base model predicts the prior. latent_scale: the VAE's scaling_factor, by which
    latents are multiplied. text_rows: the row of instance_text of each instance image. class_rows:
    the row of class_text of each subject. Both are empty where there is one prompt. kept_text,
    kept_prior_text: [T,L,D], as class_text and prior_text, of the prompts that the frozen base
    model is to keep; kept_rows: their rows in the order in which a subject's samples take them.
    """

    instance: LatentPosteriors
    class_: LatentPosteriors | None
    instance_text: torch.Tensor
    class_text: torch.Tensor | None
    latent_scale: float
    prior_text: torch.Tensor | None = None
    empty_text: torch.Tensor | None = None
    prior_empty_text: torch.Tensor | None = None
    text_rows: tuple[int, ...] = ()
    class_rows: tuple[int, ...] = ()
    kept_text: torch.Tensor | None = None
    kept_prior_text: torch.Tensor | None = None
    kept_rows: tuple[int, ...] = ()

    @property
    def subjects(self) -> int:
        """Return the number of subjects."""
        return max(1, len(self.instance.groups))

    def class_text_rows(self, numbers: range) -> list[int]:
        """Return the row of class_text of each sample, by the subject whose turn it is."""
        rows = self.class_rows or (0,) * self.subjects
        return [rows[sample_draws.subject_of(number, self.subjects)[0]] for number in numbers]


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """The inputs and the target of one micro-batch: instance, class and kept rows, in this order.

    noisy_latents, target: [B,C,h,w]. timesteps: [B]. text: [B,L,D], or token ids [B,L].
    subject_rows: float32 [S,I], 1 where an instance row is a subject's; None for a single subject.
    weights: float32 [I,1,h,w], of the instance rows' losses; None where all are equal.
    """

    noisy_latents: torch.Tensor
    timesteps: torch.Tensor
    text: torch.Tensor
    target: torch.Tensor
    subject_rows: torch.Tensor | None = None
    weights: torch.Tensor | None = None


class TrainedNetworks(nn.Module):
    """All trained networks as one module, so that several processes average all gradients."""

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
        """Return model_pred [B,C,h,w]; text is as in MicroBatch."""
        if self.text_encoder is not None:  # `_encode_text` calls this module
            text = self._encode_text(text)
        return predict(self.unet, noisy_latents, timesteps, text)


def predict(
    unet: nn.Module, noisy_latents: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor
) -> torch.Tensor:
    """Return model_pred [B,C,h,w]; inputs are cast to half precision if the weights are half."""
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
    """Train until plan.steps; yield after each step, so that the caller can log, sample and save.

    encode_text: token ids [B,L] -> encoder_hidden_states [B,L,D], used where the text encoder is
    trained. prior_unet: the frozen base model, whose prediction is the class target
    (prior_preservation_mode=prediction) and that of kept subjects. Raises TrainingDivergedError.

    `freed_gradients.train` and `fast.captured_loop.train` replace it if the training plan says so.
    """
    precision, optimizer = state.precision, state.optimizer
    networks = accelerator.prepare(TrainedNetworks(state.unet, state.text_encoder, encode_text))
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    skipped_in_a_row = 0

    while state.step < plan.steps:
        # Set the learning rate
        learning_rate = set_learning_rate(state, plan, hyperparameters)

        # Forward and backward: the gradients of the step's micro-batches add up
        losses = no_losses(plan, accelerator.device)
        for number, micro_batch in enumerate(
            micro_batches(
                state, data, plan, hyperparameters, accelerator, noise_scheduler, prior_unet
            ),
            start=1,
        ):
            # Several processes average their gradients once, after the last micro-batch.
            is_last = number == plan.gradient_accumulation_steps
            with nullcontext() if is_last else accelerator.no_sync(networks):
                losses += forward_backward(networks, micro_batch, plan, hyperparameters, precision)
        losses = accelerator.reduce(losses / plan.gradient_accumulation_steps, "mean")

        # Clip the gradients by their global norm
        precision.unscale(optimizer)
        norm = nn.utils.get_total_norm([w.grad for w in weights if w.grad is not None])
        with_class = data.class_text is not None
        metrics = read_metrics(state, plan, losses, norm, learning_rate, with_class=with_class)
        known = torch.tensor(metrics.grad_norm)  # reading `norm` would wait for the device again
        if clip_factor(known, hyperparameters.max_grad_norm) < 1:  # 1 would change nothing
            nn.utils.clip_grads_with_norm_(weights, hyperparameters.max_grad_norm, norm)

        # Update the weights, and free the gradients
        updated = precision.step(optimizer, metrics.grad_norm)
        optimizer.zero_grad(set_to_none=True)
        if not updated:  # fp16 overflow: the loss scale is lower now; repeat the step
            skipped_in_a_row = count_skipped(state, metrics, skipped_in_a_row)
            continue
        skipped_in_a_row = 0
        state.step += 1
        state.loss_total += metrics.loss
        yield metrics


def no_losses(plan: TrainingPlan, device: torch.device) -> torch.Tensor:
    """Return zeros to which the losses of `forward_backward` are added."""
    return torch.zeros(3 + len(plan.subjects) + bool(plan.kept_subjects), device=device)


def set_learning_rate(
    state: TrainingState, plan: TrainingPlan, hyperparameters: Hyperparameters
) -> float:
    """Set the optimizer's learning rate for the state's step, and return it."""
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
    """Add the gradients of a micro-batch; return its losses [3]: all, instance, class.

    With several subjects these are followed by the sum of each one's instance losses, [3+S], and
    where subjects of the base are kept by the loss of their prompts, [3+S+1].
    half_weights: the networks compute in half precision by themselves, without autocast.
    """
    with nullcontext() if half_weights else precision.autocast():
        model_pred = networks(micro_batch.noisy_latents, micro_batch.timesteps, micro_batch.text)
    target, kept_loss = micro_batch.target, None
    if plan.kept_subjects:  # the last rows
        model_pred, kept_pred = model_pred[: -plan.batch_size], model_pred[-plan.batch_size :]
        target, kept_target = target[: -plan.batch_size], target[-plan.batch_size :]
        kept_loss = squared_errors(kept_pred, kept_target).mean()
    losses = dreambooth_loss(
        model_pred,
        target,
        instances=plan.batch_size,
        prior_loss_weight=hyperparameters.prior_loss_weight,
        weights=micro_batch.weights,
    )
    total = losses.total if kept_loss is None else losses.total + KEPT_WEIGHT * kept_loss
    precision.backward(total / plan.gradient_accumulation_steps)
    class_loss = torch.zeros_like(total) if losses.class_ is None else losses.class_
    found = [torch.stack((total, losses.instance, class_loss)).detach()]
    if micro_batch.subject_rows is not None:
        of_instances, targets = (each[: plan.batch_size] for each in (model_pred.detach(), target))
        errors = squared_errors(of_instances, targets, micro_batch.weights)
        found.append(micro_batch.subject_rows @ errors)
    if kept_loss is not None:
        found.append(kept_loss.detach()[None])
    return torch.cat(found) if len(found) > 1 else found[0]


def count_skipped(state: TrainingState, metrics: StepMetrics, skipped_in_a_row: int) -> int:
    """Count a step whose fp16 gradients overflowed; return how many were skipped in a row.

    Raises TrainingDivergedError after more than MAX_SKIPPED_IN_A_ROW of them.
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
    """Yield the micro-batches of the state's step; every step has the same number of them."""
    for number in range(plan.gradient_accumulation_steps):
        numbers = sample_draws.sample_numbers(
            step=state.step,
            micro_batch=number,
            batch_size=plan.batch_size,
            micro_batches=plan.gradient_accumulation_steps,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
        )
        with state.precision.autocast():
            made = make_micro_batch(data, numbers, noise_scheduler, hyperparameters, prior_unet)
        yield made


def make_micro_batch(
    data: TrainingData,
    numbers: range,
    noise_scheduler: Any,
    hyperparameters: Hyperparameters,
    prior_unet: nn.Module | None,
) -> MicroBatch:
    """Make the instance half and, with prior preservation, the class half of a micro-batch.

    The class half has its own pictures, timesteps and noise. Where the frozen base model predicts
    it, it has the instance half's noisy latents and timesteps, and that prediction as its target.
    So have the rows that keep the base's subjects, which come last.
    """
    seed = hyperparameters.seed
    instance = _draw_half(data, "instance", numbers, noise_scheduler, seed)
    halves = [instance]
    if data.class_text is not None and hyperparameters.predicts_the_prior:
        assert prior_unet is not None
        scale = hyperparameters.training_guidance_scale
        halves = [*_predicted_prior(instance, data, numbers, prior_unet, scale)]
    elif data.class_text is not None:
        halves.append(_draw_half(data, "class", numbers, noise_scheduler, seed))
    if data.kept_text is not None:
        assert prior_unet is not None
        halves.append(_kept_rows(instance, data, numbers, prior_unet))
    if len(halves) == 1:
        return instance
    return replace(
        instance,
        noisy_latents=torch.cat([half.noisy_latents for half in halves]),
        timesteps=torch.cat([half.timesteps for half in halves]),
        text=torch.cat([half.text for half in halves]),
        target=torch.cat([half.target for half in halves]),
    )


@torch.no_grad()
def _predicted_prior(
    instance: MicroBatch,
    data: TrainingData,
    numbers: range,
    prior_unet: nn.Module,
    guidance_scale: float,
) -> tuple[MicroBatch, MicroBatch]:
    """Return the instance half, and a class half whose target the frozen base model predicts.

    A guided sampler draws with empty + g * (prompt - empty), where empty is the prediction for the
    empty prompt (Ho and Salimans 2022, equation 6), and so adds g times what the subject has moved.
    With guidance_scale > 1 the instance half's target is therefore moved that much less, so that
    the noise is what sampling at this scale predicts; and the empty prompt, which guidance starts
    from, is held to the base as the class is: it takes the class prompt's place in every other
    sample of the class half.
    """
    assert data.class_text is not None  # all four are given with prior_unet
    assert data.prior_text is not None
    dtype = instance.target.dtype
    rows = data.class_text_rows(numbers)
    prior_text = _of_rows(data.prior_text, rows)
    if guidance_scale == 1:
        text, base_text = _of_rows(data.class_text, rows), prior_text
        target = predict(prior_unet, instance.noisy_latents, instance.timesteps, base_text)
        return instance, replace(instance, text=text, target=target.to(dtype))
    assert data.empty_text is not None
    assert data.prior_empty_text is not None
    predictions = predict(
        prior_unet,
        instance.noisy_latents.repeat(2, 1, 1, 1),
        instance.timesteps.repeat(2),
        torch.cat([prior_text, _of_rows(data.prior_empty_text, [0] * len(rows))]),
    )
    of_class, of_empty = predictions.to(dtype).chunk(2)
    held_text, held_target = [], []
    for row, number in enumerate(numbers):
        _, of_subject = sample_draws.subject_of(number, data.subjects)
        is_empty = of_subject % 2 == 1
        held_text.append(data.empty_text if is_empty else _of_rows(data.class_text, rows[row:][:1]))
        held_target.append((of_empty if is_empty else of_class)[row])
    class_half = replace(instance, text=torch.cat(held_text), target=torch.stack(held_target))
    moved = (instance.target - of_empty) / guidance_scale
    return replace(instance, target=of_empty + moved), class_half


@torch.no_grad()
def _kept_rows(
    instance: MicroBatch, data: TrainingData, numbers: range, prior_unet: nn.Module
) -> MicroBatch:
    """Return rows whose target the frozen base model predicts for the prompts that are kept."""
    assert data.kept_text is not None  # both are given with kept_rows
    assert data.kept_prior_text is not None
    turns = [sample_draws.subject_of(number, data.subjects)[1] for number in numbers]
    rows = [data.kept_rows[turn % len(data.kept_rows)] for turn in turns]
    text = _of_rows(data.kept_prior_text, rows)
    target = predict(prior_unet, instance.noisy_latents, instance.timesteps, text)
    return replace(
        instance, text=_of_rows(data.kept_text, rows), target=target.to(instance.target.dtype)
    )


def _draw_half(
    data: TrainingData, stream: str, numbers: range, noise_scheduler: Any, seed: int
) -> MicroBatch:
    """Draw the instance or the class half of a micro-batch."""
    is_instance = stream == "instance"
    posteriors = data.instance if is_instance else data.class_
    text = data.instance_text if is_instance else data.class_text
    assert posteriors is not None  # pictures are cached with their text
    assert text is not None
    drawn = sample_draws.draw(
        numbers,
        seed=seed,
        stream=stream,
        crop_counts=posteriors.crop_counts,
        latent_shape=posteriors.latent_shape,
        train_timesteps=noise_scheduler.config.num_train_timesteps,
        groups=posteriors.groups,
    )
    text_rows = data.class_text_rows(numbers)
    if is_instance:
        text_rows = [data.text_rows[int(image)] if data.text_rows else 0 for image in drawn.images]
    latents = posteriors.sample(drawn) * data.latent_scale
    noise = sample_draws.onto(latents.device, drawn.noise)
    timesteps = sample_draws.onto(latents.device, drawn.timesteps)
    return MicroBatch(
        noisy_latents=noise_scheduler.add_noise(latents, noise, timesteps),
        timesteps=timesteps,
        text=_of_rows(text, text_rows),
        target=noise_target(noise_scheduler, latents, noise, timesteps),
        subject_rows=_subject_rows(data, numbers) if is_instance else None,
        weights=posteriors.loss_weights(drawn),
    )


def _of_rows(text: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Return a row of text for each sample, [B,L,D] or [B,L]."""
    if len(text) == 1:
        return text.expand(len(rows), *text.shape[1:])
    return text[sample_draws.onto(text.device, torch.tensor(rows))]


def _subject_rows(data: TrainingData, numbers: range) -> torch.Tensor | None:
    """Return MicroBatch.subject_rows of the samples."""
    if data.subjects == 1:
        return None
    found = torch.zeros(data.subjects, len(numbers))
    for row, number in enumerate(numbers):
        found[sample_draws.subject_of(number, data.subjects)[0], row] = 1
    return sample_draws.onto(data.instance.mean.device, found)
