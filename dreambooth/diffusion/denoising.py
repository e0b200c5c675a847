"""The denoising step: any pictures, wherever each stands, one U-Net call further.

A `Trajectory` is one or more pictures with one noise-scheduler state. `advance` takes any number
of trajectories one step on in a single U-Net call; they may differ in prompts, guidance, number
of steps and position, and only the latent size must match. The U-Net runs in its own dtype, the
noise-scheduler mathematics in float32.

Legend: B pictures of a call, G of them guided, C latent channels, h w latent cells, L tokens,
D text width.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Placement:
    """Where the G + B rows of a call lie among its R, for calls of a fixed number of rows.

    places: int64 [G + B], the row of each. sources: int64 [R], which of the G + B each row shows
    (padding repeats the first).
    """

    places: Tensor
    sources: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TextRows:
    """What a U-Net call is told about its B pictures; rebuilt only when the pictures change.

    encoder_hidden_states: [G + B, L, D], the negative prompts of the guided pictures, then the
    prompts of all; with a placement [R, L, D] as that says. guided: int64 [G], their places among
    the B. guidance_scale: float32 [G, 1, 1, 1].
    """

    encoder_hidden_states: Tensor
    guided: Tensor
    guidance_scale: Tensor
    placement: Placement | None = None


@dataclass(slots=True, kw_only=True, eq=False)
class Trajectory:
    """Pictures on their way through one noise scheduler, which keeps their common history.

    latents: float32 [B, C, h, w], noisy but for the end. position: steps taken, out of
    len(timesteps). step_options: what the noise scheduler's step takes besides, such as eta and
    the generators (one per picture) of those that draw noise while they step.
    """

    scheduler: Any
    timesteps: Tensor
    latents: Tensor
    step_options: dict[str, Any]
    position: int = 0

    @property
    def finished(self) -> bool:
        """Whether every step has been taken."""
        return self.position >= len(self.timesteps)

    @property
    def timestep(self) -> Tensor:
        """The training timestep at which the latents stand (no dimensions)."""
        return self.timesteps[self.position]

    def model_input(self) -> Tensor:
        """Return the latents as the U-Net wants to see them: float32 [B, C, h, w]."""
        scaled: Tensor = self.scheduler.scale_model_input(self.latents, self.timestep)
        return scaled

    def step(self, model_pred: Tensor) -> None:
        """Move the latents one step, given the guided prediction float32 [B, C, h, w]."""
        # A caller's autocast would round parts of the mathematics (einsum in UniPC) to half.
        kind = self.latents.device.type
        rounding = torch.is_autocast_enabled(kind)
        with torch.autocast(kind, enabled=False) if rounding else contextlib.nullcontext():
            self.latents = self.scheduler.step(
                model_pred, self.timestep, self.latents, **self.step_options, return_dict=False
            )[0]
        self.position += 1


def advance(unet: Any, trajectories: Sequence[Trajectory], text: TextRows) -> None:
    """Take every trajectory one step further in one U-Net call; `text` is in the same order."""
    preds = predictions(unet, trajectories, text)
    for trajectory, pred in zip(trajectories, preds, strict=True):
        trajectory.step(pred)


def predictions(
    unet: Any, trajectories: Sequence[Trajectory], text: TextRows, *, most_rows: int | None = None
) -> tuple[Tensor, ...]:
    """Return what `step` of each trajectory needs, float32 [B, C, h, w]; no trajectory moves.

    One U-Net call, or several of at most `most_rows` rows each, where memory is short.
    """
    parts = [trajectory.model_input() for trajectory in trajectories]
    timesteps = [each.timestep.expand(len(each.latents)) for each in trajectories]
    model_input = torch.cat(parts)
    on_device = torch.cat(timesteps).to(model_input.device, non_blocking=True)
    model_pred = predict(unet, model_input, on_device, text, most_rows=most_rows)
    return torch.split(model_pred, [len(part) for part in parts])


def predict(
    unet: Any,
    model_input: Tensor,
    timesteps: Tensor,
    text: TextRows,
    *,
    most_rows: int | None = None,
) -> Tensor:
    """Return the guided prediction float32 [B, C, h, w] of ONE U-Net call of G + B rows.

    model_input: [B, C, h, w], already scaled for the noise scheduler. timesteps: [B], each
    picture's own. What is predicted (noise or v) is the noise scheduler's to know.
    """
    rows = torch.cat([model_input[text.guided], model_input]).to(unet.dtype)
    row_timesteps = torch.cat([timesteps[text.guided], timesteps])
    placement = text.placement
    if placement is not None:
        rows, row_timesteps = rows[placement.sources], row_timesteps[placement.sources]
    output = _call(unet, rows, row_timesteps, text.encoder_hidden_states, most_rows).float()
    if placement is not None:
        output = output[placement.places]
    unconditional, conditional = output[: len(text.guided)], output[len(text.guided) :]
    if not len(unconditional):
        return conditional
    if len(unconditional) == len(conditional):  # all are guided, in order
        return guide(conditional, unconditional, text.guidance_scale)
    guided = guide(conditional[text.guided], unconditional, text.guidance_scale)
    return conditional.index_copy(0, text.guided, guided)


def _call(
    unet: Any, rows: Tensor, timesteps: Tensor, text: Tensor, most_rows: int | None
) -> Tensor:
    """The U-Net's own prediction for every row, [R, C, h, w]."""
    size = len(rows) if most_rows is None else most_rows
    parts = zip(*(torch.split(each, size) for each in (rows, timesteps, text)), strict=True)
    outputs = [
        unet(latents, times, encoder_hidden_states=hidden, return_dict=False)[0]
        for latents, times, hidden in parts
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def guide(conditional: Tensor, unconditional: Tensor, guidance_scale: Tensor) -> Tensor:
    """Classifier-free guidance, equation (6) of arXiv 2207.12598 with w + 1 = guidance_scale."""
    return unconditional + guidance_scale * (conditional - unconditional)


class SchedulerTemplates:
    """Noise schedulers ready to walk, copied from one made before: 20 µs instead of milliseconds.

    A copy shares the tables of its template, which no noise scheduler of diffusers writes to, and
    has its own history (lists).
    """

    def __init__(self, make: Callable[[], Any], *, most: int = 64) -> None:
        """`make` returns a fresh noise scheduler; at most `most` step counts are remembered."""
        self._make = make
        self._most = most
        self._templates: dict[int, tuple[Any, Tensor]] = {}

    def take(self, num_inference_steps: int) -> tuple[Any, Tensor]:
        """Return a noise scheduler at its first step, and the timesteps that it will walk."""
        if num_inference_steps not in self._templates:
            if len(self._templates) >= self._most:
                del self._templates[next(iter(self._templates))]
            fresh = self._make()
            self._templates[num_inference_steps] = fresh, timesteps_of(fresh, num_inference_steps)
        template, timesteps = self._templates[num_inference_steps]
        scheduler = copy.copy(template)
        for name, value in vars(template).items():
            if isinstance(value, list):
                setattr(scheduler, name, list(value))
        return scheduler, timesteps


def timesteps_of(scheduler: Any, num_inference_steps: int) -> Tensor:
    """Set the scheduler to num_inference_steps and return the timesteps it will walk, [steps].

    A noise scheduler may walk more than were asked for (PNDM one more, Heun nearly twice).
    """
    # They stay on the CPU: noise schedulers read them as numbers, which would stall a GPU.
    scheduler.set_timesteps(num_inference_steps, device="cpu")
    timesteps: Tensor = scheduler.timesteps
    return timesteps
