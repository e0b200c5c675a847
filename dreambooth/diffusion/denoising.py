"""The denoising step: one U-Net call advances pictures that may be at different positions.

Pictures (`trajectories`) of one call may also differ in prompts, guidance and number of steps; only
their latent sizes must match. The U-Net runs in its own dtype, guidance in float32.

Legend: B pictures of a call, G of them guided, R rows of a call, C latent channels, h w latent
cells, L tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dreambooth.diffusion import trajectories
from dreambooth.diffusion.trajectories import Trajectory


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Placement:
    """The arrangement of G + B rows in a call that has a fixed number of rows, R.

    places: int64 [G + B], the row of the call that holds each of them. sources: int64 [R], which of
    the G + B each row of the call holds (padding repeats the first).
    """

    places: Tensor
    sources: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TextRows:
    """The text inputs of a U-Net call on B pictures; rebuilt only when the pictures change.

    encoder_hidden_states: [G + B, L, D], the negative prompts of the guided pictures, then the
    prompts of all pictures; with a placement, [R, L, D] in the order of its sources. guided: int64
    [G], the indices of the guided pictures among the B. guidance_scale: float32 [G, 1, 1, 1].
    """

    encoder_hidden_states: Tensor
    guided: Tensor
    guidance_scale: Tensor
    placement: Placement | None = None


def advance(unet: Any, pictures: Sequence[Trajectory], text: TextRows) -> None:
    """Advance every picture by one step with one U-Net call; `text` is in the pictures' order."""
    trajectories.step(pictures, predictions(unet, pictures, text))


def predictions(
    unet: Any, pictures: Sequence[Trajectory], text: TextRows, *, most_rows: int | None = None
) -> Tensor:
    """Return the input of `trajectories.step`, float32 [B, C, h, w]; no picture advances.

    most_rows: rows per U-Net call, at most; None: one call. Several calls take less memory.
    """
    model_input = trajectories.model_input(pictures)
    timesteps = trajectories.timesteps(pictures).to(model_input.device, non_blocking=True)
    return predict(unet, model_input, timesteps, text, most_rows=most_rows)


def predict(
    unet: Any,
    model_input: Tensor,
    timesteps: Tensor,
    text: TextRows,
    *,
    most_rows: int | None = None,
) -> Tensor:
    """Return the guided predictions, float32 [B, C, h, w], of one U-Net call of G + B rows.

    model_input: [B, C, h, w], already scaled for the noise scheduler. timesteps: [B], one per
    picture. most_rows: as in `predictions`. Whether the predictions are noise or velocity matters
    to the noise scheduler only.
    """
    rows, row_timesteps = _twice(model_input, text).to(unet.dtype), _twice(timesteps, text)
    placement = text.placement
    if placement is not None:
        rows = rows.index_select(0, placement.sources)
        row_timesteps = row_timesteps.index_select(0, placement.sources)
    output = _call(
        unet, rows, row_timesteps, text.encoder_hidden_states, most_rows=most_rows
    ).float()
    if placement is not None:
        output = output.index_select(0, placement.places)
    unconditional, conditional = output[: len(text.guided)], output[len(text.guided) :]
    if not len(unconditional):
        return conditional
    if len(unconditional) == len(conditional):  # all are guided, in order
        return guide(conditional, unconditional, text.guidance_scale)
    chosen = conditional.index_select(0, text.guided)
    guided = guide(chosen, unconditional, text.guidance_scale)
    return conditional.index_copy(0, text.guided, guided)


def _twice(of_pictures: Tensor, text: TextRows) -> Tensor:
    """Return [B, ...] as [G + B, ...]: the guided pictures, then all pictures."""
    if not len(text.guided):
        return of_pictures
    if len(text.guided) == len(of_pictures):
        return torch.cat([of_pictures, of_pictures])
    return torch.cat([of_pictures.index_select(0, text.guided), of_pictures])


def _call(
    unet: Any, rows: Tensor, timesteps: Tensor, text: Tensor, *, most_rows: int | None
) -> Tensor:
    """Return the U-Net's own prediction for every row, [R, C, h, w]."""
    if most_rows is None or len(rows) <= most_rows:
        output: Tensor = unet(rows, timesteps, encoder_hidden_states=text, return_dict=False)[0]
        return output
    parts = zip(*(torch.split(each, most_rows) for each in (rows, timesteps, text)), strict=True)
    return torch.cat([_call(unet, *part, most_rows=most_rows) for part in parts])


def guide(conditional: Tensor, unconditional: Tensor, guidance_scale: Tensor) -> Tensor:
    """Apply classifier-free guidance: arXiv 2207.12598, equation (6), w + 1 = guidance_scale."""
    return (conditional - unconditional).mul_(guidance_scale).add_(unconditional)
