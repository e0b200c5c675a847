"""The DreamBooth loss as pure functions.

Legend: I instance rows, K class rows, C latent channels, h w latent cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from dreambooth.errors import ModelArtifactError, quoted


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """The losses as float32 scalars: total = instance + prior_loss_weight * class_.

    class_ is None without prior preservation.
    """

    total: torch.Tensor
    instance: torch.Tensor
    class_: torch.Tensor | None


def noise_target(
    noise_scheduler: Any, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """Return what the U-Net should predict: the noise, or the velocity (v-prediction), [B,C,h,w].

    Epsilon: Ho et al. 2020, eq. 14. Velocity: Salimans and Ho 2022, section 4 and appendix D.
    Raises ModelArtifactError for a prediction type that Stable Diffusion does not use.
    """
    prediction_type = noise_scheduler.config.prediction_type
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        velocity: torch.Tensor = noise_scheduler.get_velocity(latents, noise, timesteps)
        return velocity
    raise ModelArtifactError(
        f"The noise scheduler's prediction_type is {quoted(prediction_type)}; "
        "models that predict 'epsilon' or 'v_prediction' can be trained."
    )


def squared_errors(
    model_pred: torch.Tensor, target: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the squared error of each row, a mean over its elements: [B,C,h,w] twice -> [B].

    weights: [B,1,h,w], as in `dreambooth_loss`.
    """
    errors = F.mse_loss(model_pred.float(), target.float(), reduction="none")
    return (errors if weights is None else errors * weights).flatten(1).mean(1)


def dreambooth_loss(
    model_pred: torch.Tensor,
    target: torch.Tensor,
    *,
    instances: int,
    prior_loss_weight: float,
    weights: torch.Tensor | None = None,
) -> Losses:
    """Return the squared error on the subject plus lambda times that on the class.

    Source: Ruiz et al. 2022 (arXiv 2208.12242v2), section 3.3, equation 2.

    model_pred, target: [I+K,C,h,w], where K is 0 without prior preservation. instances: I; these
    rows come first. weights: [I,1,h,w], of mean 1, by which their errors are multiplied; None for
    equal ones. Each half's loss is a mean over its elements.
    """
    squared_error = F.mse_loss(model_pred.float(), target.float(), reduction="none")
    of_instances = squared_error[:instances]
    instance = (of_instances if weights is None else of_instances * weights).mean()
    if len(squared_error) == instances:
        return Losses(total=instance, instance=instance, class_=None)
    class_ = squared_error[instances:].mean()
    return Losses(total=instance + prior_loss_weight * class_, instance=instance, class_=class_)
