"""Measure between steps how far training has moved the model, on inputs that never change.

Two things are read. The loss on the instance pictures at fixed noise, relative to the base model's,
for each quarter of the timesteps: how much of the subject is learned, and at which noise. And the
drift: how far the predictions for the class prompt, another class's prompt and the empty prompt
have moved from the base model's, as a share of how far those for the instance prompt have. At 1
the class has moved as much as the subject. Guided sampling draws with
`empty + guidance_scale * (prompt - empty)` (Ho and Salimans 2022, equation 6), so that what lies
between the predictions for the instance prompt and the empty one is multiplied: how wide that has
become, in units of the base's, is read too.

The base's predictions are made once, before the first step, and kept on the CPU; there is no second
U-Net. Nothing here draws from the random generators of training.

Legend: R rows, C latent channels, h w latent cells, L tokens, D text width.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dreambooth.data import sample_draws
from dreambooth.data.cache import LatentPosteriors
from dreambooth.diffusion.loss import noise_target
from dreambooth.settings.hyperparameters import Hyperparameters
from dreambooth.training import meter_budget
from dreambooth.training.plan import TrainingPlan

BINS = 4
ROWS_PER_BIN = 2
SHARE = 0.1  # of a run's work that readings may take
INSTANCE = "instance"
CLASS, OTHER_CLASS, EMPTY = "class", "other_class", "empty"
WINDOW = 4  # readings whose variance tells of convergence

# (noisy_latents [R,C,h,w], timesteps [R], text [R,L,D]) -> model_pred float32 [R,C,h,w]
Predict = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class MeterReading:
    """What is read after one step.

    losses: of each of BINS bins of timesteps, the low ones first, and loss of all: on the instance
    pictures, divided by the base model's. drifts: by CLASS, OTHER_CLASS and EMPTY the mean squared
    change of the prediction, divided by that for the instance prompt; moved is that one itself.
    guidance: the root mean square of what guidance multiplies, divided by the base model's.
    convergence: the variance of the last WINDOW losses divided by that of all so far, the criterion
    of DVAR (arXiv 2302.04841, section 4.2: below .4 a run has converged); None before there are
    more than WINDOW.
    """

    step: int
    loss: float
    losses: tuple[float, ...]
    drifts: Mapping[str, float]
    moved: float
    guidance: float
    convergence: float | None

    def as_json(self) -> dict[str, Any]:
        """Return the reading as checkpoints hold it."""
        return asdict(self)

    def figures(self) -> dict[str, float]:
        """Return all numbers but the step by name, as metrics.jsonl holds them."""
        found = {"loss": self.loss}
        found |= {f"loss_{number}": loss for number, loss in enumerate(self.losses, start=1)}
        found |= {f"drift_{name}": drift for name, drift in self.drifts.items()}
        found |= {"moved": self.moved, "guidance": self.guidance}
        return found if self.convergence is None else found | {"convergence": self.convergence}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> MeterReading:
        """Return the reading that `as_json` has written. Raises ValueError, KeyError, TypeError."""
        convergence = raw["convergence"]
        return cls(
            step=int(raw["step"]),
            loss=float(raw["loss"]),
            losses=tuple(float(loss) for loss in raw["losses"]),
            drifts={str(name): float(drift) for name, drift in dict(raw["drifts"]).items()},
            moved=float(raw["moved"]),
            guidance=float(raw["guidance"]),
            convergence=None if convergence is None else float(convergence),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _FixedInputs:
    """Noisy latents of the instance pictures, the same rows in the same order at every reading.

    Row i is of bin i % BINS, so that the first BINS rows hold one of each. pictures: int64 [R].
    """

    pictures: torch.Tensor
    noisy_latents: torch.Tensor
    timesteps: torch.Tensor
    target: torch.Tensor


def reading_interval(plan: TrainingPlan, hyperparameters: Hyperparameters) -> int | None:
    """Return after how many steps the meter is read, None where a run is too short for it.

    What is counted is rows of a forward pass, as `meter_budget` does, so that the interval does not
    depend on a clock. The base's predictions and the last reading are within SHARE too.
    """
    reading_rows = BINS * (ROWS_PER_BIN + 3)
    rows = meter_budget.run_rows(hyperparameters, steps=plan.steps, memory_plan=plan)
    readings = math.floor(SHARE * rows / reading_rows) - 1
    return math.ceil(plan.steps / readings) if readings > 0 else None


class Meter:
    """Reads the model in training; `start` must have been called while it was the base model."""

    def __init__(
        self,
        instance: LatentPosteriors,
        *,
        latent_scale: float,
        noise_scheduler: Any,
        seed: int,
        prompts: Mapping[str, Sequence[str]],
        encode_text: Callable[[str], torch.Tensor],
        predict: Predict,
        interval: int,
        steps: int,
    ) -> None:
        """Make the fixed inputs from the seed.

        prompts: the prompt for each picture, by INSTANCE, EMPTY, OTHER_CLASS and, where there is
        one, CLASS.
        encode_text: prompt -> encoder_hidden_states [1,L,D]. interval: after how many steps it is
        read; it is read after the last of `steps` too.
        """
        self._inputs = _fixed_inputs(instance, latent_scale, noise_scheduler, seed)
        self._prompts = {
            name: [of_pictures[int(picture)] for picture in self._inputs.pictures]
            for name, of_pictures in prompts.items()
        }
        self._encode_text, self._predict = encode_text, predict
        self._interval, self._steps = interval, steps
        self._base: dict[str, torch.Tensor] = {}

    def start(self) -> None:
        """Keep the base model's predictions."""
        self._base = {name: self._predictions(name) for name in self._prompts}

    def is_due(self, step: int, before: int) -> bool:
        """Return whether to read after `step`, where `before` was the last one looked at."""
        return step // self._interval > before // self._interval or step == self._steps

    def read(self, step: int, earlier: Sequence[MeterReading]) -> MeterReading:
        """Read the model as it is after `step`. earlier: the readings of this run so far."""
        now = {name: self._predictions(name) for name in self._prompts}
        moved = _mean_squares(now[INSTANCE] - self._base[INSTANCE])
        losses = _mean_squares(now[INSTANCE] - self._inputs.target)
        base_losses = _mean_squares(self._base[INSTANCE] - self._inputs.target)
        loss = float(losses.mean() / base_losses.mean())
        there = 1.0, *(one.loss for one in earlier), loss  # the base's is 1
        convergence = None
        if len(there) > WINDOW:
            of_all = statistics.pvariance(there)
            convergence = statistics.pvariance(there[-WINDOW:]) / of_all if of_all else 0.0
        return MeterReading(
            step=step,
            loss=loss,
            losses=tuple((_by_bin(losses) / _by_bin(base_losses)).tolist()),
            drifts={
                name: _mean_square(now[name] - self._base[name])
                / max(float(moved[: len(now[name])].mean()), 1e-12)
                for name in self._prompts
                if name != INSTANCE
            },
            moved=float(moved.mean()),
            guidance=_guided(now) / max(_guided(self._base), 1e-6),
            convergence=convergence,
        )

    def _predictions(self, name: str) -> torch.Tensor:
        """Return the predictions [R,C,h,w] for a prompt, on the CPU.

        The instance prompt has all rows, the others the first of each bin.
        """
        inputs = self._inputs
        rows = BINS * ROWS_PER_BIN if name == INSTANCE else BINS
        prompts = self._prompts[name][:rows]
        texts = {prompt: self._encode_text(prompt) for prompt in dict.fromkeys(prompts)}
        text = torch.cat([texts[prompt] for prompt in prompts])
        return self._predict(inputs.noisy_latents[:rows], inputs.timesteps[:rows], text).cpu()


def _fixed_inputs(
    instance: LatentPosteriors, latent_scale: float, noise_scheduler: Any, seed: int
) -> _FixedInputs:
    """Return rows whose timesteps lie in the middle parts of each bin, pictures in turn."""
    train_timesteps = noise_scheduler.config.num_train_timesteps
    blocks = [  # a number is left out between two, so that several subjects change their bins
        sample_draws.draw(
            range(block * (BINS + 1), block * (BINS + 1) + BINS),
            seed=seed,
            stream="meter",
            crop_counts=instance.crop_counts,
            latent_shape=instance.latent_shape,
            train_timesteps=train_timesteps,
            groups=instance.groups,
        )
        for block in range(ROWS_PER_BIN)
    ]
    pictures = torch.cat([block.images for block in blocks])
    noise = torch.cat([block.noise for block in blocks])
    # Evenly spread: row i of a bin stands in the middle of its ROWS_PER_BINth part of the bin.
    places = [
        ((row % BINS) + (row // BINS + 0.5) / ROWS_PER_BIN) / BINS
        for row in range(BINS * ROWS_PER_BIN)
    ]
    timesteps = torch.tensor([int(place * train_timesteps) for place in places])
    latents = torch.cat([instance.sample(block) for block in blocks]).cpu() * latent_scale
    return _FixedInputs(
        pictures=pictures,
        noisy_latents=noise_scheduler.add_noise(latents, noise, timesteps),
        timesteps=timesteps,
        target=noise_target(noise_scheduler, latents, noise, timesteps),
    )


def _mean_squares(difference: torch.Tensor) -> torch.Tensor:
    """Return the mean square of each row, float32 [R]."""
    return difference.float().square().flatten(1).mean(1)


def _mean_square(difference: torch.Tensor) -> float:
    return float(difference.float().square().mean())


def _guided(predictions: Mapping[str, torch.Tensor]) -> float:
    """Return the root mean square of instance - empty, over the first row of each bin."""
    empty = predictions[EMPTY]
    return math.sqrt(_mean_square(predictions[INSTANCE][: len(empty)] - empty))


def _by_bin(rows: torch.Tensor) -> torch.Tensor:
    """Return the mean of each bin's rows, [BINS]."""
    return rows.view(ROWS_PER_BIN, BINS).mean(0)
