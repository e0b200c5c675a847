"""Noise schedules as tables: what every step of a noise scheduler makes of what it is given.

Nearly all noise schedulers are linear. With x_k the latents and e_k the predictions k steps ago
(x_0 and e_0 are today's), and fresh noise z where one draws it,

    next latents = sum over k < DEPTH of a_k * x_k + b_k * e_k,  + c * z

and a, b, c depend on nothing but configuration, number of steps and position. So pictures at any
position share one expression (`trajectories`). Nothing is written down twice: the numbers are read
off diffusers' own code (`schedule_reading`). What is not linear (clipped, thresholded) or remembers
more has no table, and is asked step by step.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DEPTH = 4  # today's latents and prediction and those of so many steps less one


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRow:
    """One step. weights: a_0, b_0, a_1, b_1, ..., of 2 * DEPTH numbers.

    used: its bit k says that weights[k] is not 0. input_scale: of the latents, as the U-Net wants
    to see them. noise: c, None where no noise is drawn (0: it is drawn for nothing).
    """

    weights: tuple[float, ...]
    used: int
    input_scale: float
    noise: float | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Schedule:
    """A noise scheduler set to a number of steps.

    template: diffusers' noise scheduler at its first step; copies of it walk. timesteps: on the
    CPU, [steps]. timestep_values: the same as numbers. rows: its table, a row per step, None if it
    has none. depth: how many past steps the table reaches back to. options: what its `step` takes
    besides (eta), a generator not included. takes_generator: whether it takes one.
    """

    template: Any
    timesteps: Tensor
    timestep_values: tuple[float, ...]
    rows: tuple[StepRow, ...] | None
    depth: int
    options: dict[str, float]
    takes_generator: bool

    def noise_scheduler(self) -> Any:
        """Return a noise scheduler at its first step, with a history (lists) of its own.

        It shares the tables of its template, which no noise scheduler of diffusers writes to:
        20 µs instead of milliseconds.
        """
        scheduler = copy.copy(self.template)
        for name, value in vars(self.template).items():
            if isinstance(value, list):
                setattr(scheduler, name, list(value))
        return scheduler

    def step_options(self, generator: torch.Generator) -> dict[str, Any]:
        """Return what `step` of this noise scheduler takes besides, for one picture."""
        return self.options | ({"generator": [generator]} if self.takes_generator else {})


def timesteps_of(noise_scheduler: Any, num_inference_steps: int) -> Tensor:
    """Set a noise scheduler to num_inference_steps; return the timesteps it will walk, [steps].

    It may walk more than were asked for (PNDM one more, Heun nearly twice).
    """
    # They stay on the CPU: noise schedulers read them as numbers, which would stall a GPU.
    noise_scheduler.set_timesteps(num_inference_steps, device="cpu")
    timesteps: Tensor = noise_scheduler.timesteps
    return timesteps
