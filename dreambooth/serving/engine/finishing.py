"""Turn clean latents into a `Picture`, in parts that other work may interrupt."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
from torch import Tensor

from dreambooth.diffusion.decoding import decode_in_parts
from dreambooth.diffusion.model import DiffusionModel
from dreambooth.diffusion.safety import SafetyChecker
from dreambooth.serving.contract.reply import FinishReason, Picture


def finish(
    model: DiffusionModel,
    latents: Tensor,
    *,
    seed: int,
    exact: bool,
    safety_checker: SafetyChecker | None,
) -> Generator[None, None, Picture]:
    """Decode one picture from latents [1, C, h, w] (C latent channels, h w latent cells).

    A picture that cannot be shown becomes zeros, and finish_reason says why. Yields where other
    work may run first: between two layers of the VAE, and before the safety checker.
    """
    decoded = yield from decode_in_parts(model, latents)
    reason: FinishReason = "SUCCESS"
    if decoded is None:
        reason = "NOT_FINITE"
    elif not decoded.any():
        reason = "BLACK"
    elif safety_checker is not None:
        yield
        if safety_checker.hides(decoded[0]):
            reason = "CONTENT_FILTERED"
    if decoded is None or reason != "SUCCESS":
        scale = model.vae_scale_factor
        decoded = np.zeros((1, latents.shape[2] * scale, latents.shape[3] * scale, 3), np.uint8)
    return Picture(
        pixels=np.ascontiguousarray(decoded[0]), seed=seed, finish_reason=reason, exact=exact
    )
