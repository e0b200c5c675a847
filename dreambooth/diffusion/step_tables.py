"""Noise schedules as tables: the weights with which every step combines its inputs.

Nearly all noise schedulers are linear. With x_k the latents and e_k the predictions k steps ago
(x_0 and e_0 are those of the current step), and fresh noise z if the scheduler draws it,

    next latents = sum over k < DEPTH of a_k * x_k + b_k * e_k,  + c * z

and a, b, c depend only on configuration, number of steps and position. So pictures at any positions
share one expression (`trajectories`). The numbers are not written down here but read off diffusers'
own code (`schedule_reading`). A noise scheduler that is not linear (clipped, thresholded) or
remembers more steps has no table; its steps are taken by diffusers' own code.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DEPTH = 4  # latents and predictions of the current step and of DEPTH - 1 steps before it


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRow:
    """The weights of one step.

    weights: a_0, b_0, a_1, b_1, ..., 2 * DEPTH numbers. used: bit k is set if weights[k] is not 0.
    input_scale: the factor on the latents that the U-Net gets. noise: c; None if no noise is drawn
    (0: noise is drawn and not used).
    """

    weights: tuple[float, ...]
    used: int
    input_scale: float
    noise: float | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Schedule:
    """A noise scheduler set to a number of steps.

    template: diffusers' noise scheduler at its first step; only copies of it take steps. timesteps:
    on the CPU, [steps]. timestep_values: the same as numbers. rows: its table, one row per step;
    None if it has none. depth: how many past steps the table uses. options: the further arguments
    of its `step` (eta), without the generator. takes_generator: whether `step` takes one.
    """

    template: Any
    timesteps: Tensor
    timestep_values: tuple[float, ...]
    rows: tuple[StepRow, ...] | None
    depth: int
    options: dict[str, float]
    takes_generator: bool

    def noise_scheduler(self) -> Any:
        """Return a noise scheduler at its first step, with its own history (lists).

        It shares the template's tables, which no noise scheduler of diffusers writes to; so this
        takes 20 µs instead of milliseconds.
        """
        scheduler = copy.copy(self.template)
        for name, value in vars(self.template).items():
            if isinstance(value, list):
                setattr(scheduler, name, list(value))
        return scheduler

    def step_options(self, generator: torch.Generator) -> dict[str, Any]:
        """Return the further arguments of this noise scheduler's `step` for one picture."""
        return self.options | ({"generator": [generator]} if self.takes_generator else {})


def timesteps_of(noise_scheduler: Any, num_inference_steps: int) -> Tensor:
    """Set a noise scheduler to num_inference_steps; return its timesteps, [steps].

    There may be more of them than were asked for (PNDM has one more, Heun nearly twice as many).
    """
    # They stay on the CPU: noise schedulers read them as numbers, which would stall a GPU.
    noise_scheduler.set_timesteps(num_inference_steps, device="cpu")
    timesteps: Tensor = noise_scheduler.timesteps
    return timesteps
