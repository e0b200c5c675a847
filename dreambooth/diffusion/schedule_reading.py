"""Reads the table of a schedule (`step_tables`) off diffusers' own noise scheduler.

The noise scheduler is driven through all its steps once, in float64. What it is given as latents
and predictions are vectors with three kinds of entries:

unit entries    entry 2 n is 1 in the latents before step n and 0 in all others; entry 2 n + 1 is 1
                in the n-th prediction and 0 in all others. A linear step returns there the weight
                with which that input enters.
random entries  latents and predictions are random numbers. The finished table must reproduce what
                the noise scheduler made of them; else it is not linear, and has no table.
zero entries    everything given is 0. What a step returns there is noise that it has added.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dreambooth.diffusion.step_tables import DEPTH, Schedule, StepRow, timesteps_of

ROWS_AT_ONCE = 32  # reading this many steps takes about 10 ms
_RANDOM, _ZEROS = 32, 32  # how many random and zero entries there are
_NEGLIGIBLE = 1e-9  # a weight below this share of its row's largest is a rounding error
_TOLERANCE = 1e-5  # relative; noise schedulers compute their own numbers in float32


def read(noise_scheduler: Any, num_inference_steps: int, *, eta: float = 0.0) -> Schedule:
    """Set a fresh noise scheduler of diffusers to its steps, and return its schedule."""
    schedule = None
    reader = Reader(noise_scheduler, num_inference_steps, eta=eta)
    while schedule is None:
        schedule = reader.read_on(ROWS_AT_ONCE)
    return schedule


@functools.cache
def _step_parameters(scheduler_class: Any) -> frozenset[str]:
    return frozenset(inspect.signature(scheduler_class.step).parameters)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _AddedNoise:
    """The noise that one step has added. weight: c, None if the step draws none.

    values: c * z in every entry. rounding: the error that rounding makes in an entry at most, as a
    multiple of its z.
    """

    weight: float | None
    values: Tensor
    rounding: float


class Reader:
    """Reads the table of one noise scheduler, some steps at a time."""

    def __init__(self, noise_scheduler: Any, num_inference_steps: int, *, eta: float) -> None:
        """Take a fresh noise scheduler of diffusers."""
        kind: Any = type(noise_scheduler)
        known = _step_parameters(kind)
        timesteps = timesteps_of(noise_scheduler, num_inference_steps)
        self._schedule = Schedule(
            template=noise_scheduler,
            timesteps=timesteps,
            timestep_values=tuple(timesteps.tolist()),
            rows=None,
            depth=0,
            options={"eta": eta} if "eta" in known else {},
            takes_generator="generator" in known,
        )
        self._noise_scheduler = self._schedule.noise_scheduler()
        self._generator = torch.Generator("cpu").manual_seed(0)
        self._rows: list[StepRow] = []
        steps = len(timesteps)
        self._unit_count = 2 * steps
        self._random = slice(self._unit_count, self._unit_count + _RANDOM)
        draws = torch.Generator("cpu").manual_seed(1)
        # Small numbers and large ones: a noise scheduler that clips shows it in the large ones.
        sizes = torch.tensor([1.0, 1000.0], dtype=torch.float64).repeat(_RANDOM // 2)
        self._preds = torch.randn(steps, _RANDOM, generator=draws, dtype=torch.float64) * sizes
        # Of the random entries, step by step: latents, model inputs and added noise.
        self._latents = [torch.randn(_RANDOM, generator=draws, dtype=torch.float64) * sizes]
        self._model_inputs: list[Tensor] = []
        self._noise: list[Tensor] = []
        # Of the step before: what it returned in the unit entries, and whether it added noise.
        self._last_weights = torch.zeros(self._unit_count, dtype=torch.float64)
        self._last_drew = False

    @torch.no_grad()
    def read_on(self, most_steps: int) -> Schedule | None:
        """Read at most `most_steps` further steps; return None until the last one has been read.

        The schedule has no table if the noise scheduler is not linear or remembers more than DEPTH
        steps.
        """
        first = len(self._rows)
        for position in range(first, min(first + most_steps, len(self._schedule.timestep_values))):
            row = self._row(position)
            if row is None:
                return self._schedule
            self._rows.append(row)
        if len(self._rows) < len(self._schedule.timestep_values):
            return None
        if not self._reproduces_the_random_entries():
            return self._schedule
        reach = max((row.used.bit_length() + 1) // 2 for row in self._rows)
        return dataclasses.replace(self._schedule, rows=tuple(self._rows), depth=max(0, reach - 1))

    def _row(self, position: int) -> StepRow | None:
        """Take one step with the noise scheduler; return its row, None if it can have none."""
        latents = self._entries(2 * position, self._latents[-1])
        pred = self._entries(2 * position + 1, self._preds[position])
        timestep = self._schedule.timesteps[position]
        scaled = self._noise_scheduler.scale_model_input(latents, timestep).double().flatten()
        before = self._generator.get_state()
        options = self._schedule.step_options(self._generator)
        made = self._noise_scheduler.step(pred, timestep, latents, **options, return_dict=False)[0]
        returned = made.double().flatten()
        noise = self._added_noise(returned, before)
        if noise is None:
            return None
        self._latents.append(returned[self._random])
        self._model_inputs.append(scaled[self._random])
        self._noise.append(noise.values[self._random])
        weights = self._weights((returned - noise.values)[: self._unit_count], position, noise)
        if weights is None:
            return None
        return StepRow(
            weights=weights,
            used=sum(1 << k for k, weight in enumerate(weights) if weight),
            input_scale=float(scaled[2 * position]),
            noise=noise.weight,
        )

    def _entries(self, unit: int, random: Tensor) -> Tensor:
        """Return a vector as latents [1, 1, 1, entries], with its 1 at `unit`."""
        entries = torch.zeros(self._unit_count + _RANDOM + _ZEROS, dtype=torch.float64)
        entries[unit] = 1.0
        entries[self._random] = random
        return entries.reshape(1, 1, 1, -1)

    def _added_noise(self, returned: Tensor, before: Tensor) -> _AddedNoise | None:
        """Return the noise in what a step returned; None if it is not c * randn of our generator.

        before: the generator's state before the step.
        """
        zeros = returned[-_ZEROS:]
        if torch.equal(self._generator.get_state(), before):
            none = _AddedNoise(weight=None, values=torch.zeros_like(returned), rounding=0.0)
            return None if bool(zeros.any()) else none
        for dtype, rounding in ((torch.float64, 1e-9), (torch.float32, 1e-6)):
            again = torch.Generator("cpu")
            again.set_state(before)
            z = torch.randn((1, 1, 1, len(returned)), generator=again, dtype=dtype)
            z = z.double().flatten()
            z_at_zeros = z[-_ZEROS:]
            weight = float(zeros @ z_at_zeros / (z_at_zeros @ z_at_zeros))
            rounding *= abs(weight)
            errors = (zeros - weight * z_at_zeros).abs()
            if bool((errors <= rounding * z_at_zeros.abs()).all()):
                return _AddedNoise(weight=weight, values=weight * z, rounding=rounding)
        return None

    def _weights(
        self, returned: Tensor, position: int, noise: _AddedNoise
    ) -> tuple[float, ...] | None:
        """Return a_0, b_0, a_1, b_1, ... of a step, given what it returned in the unit entries.

        None if the step needs inputs of more than DEPTH steps.

        UniPC works on latents that it corrects and never returns, so its steps seem to need every
        input since the first. They do not: the step before showed that its returned latents equal a
        weighted sum of older inputs. Their difference is 0, and any multiple of it may be added to
        this step. The multiple that cancels the weights of distant inputs is taken.
        """
        first = max(0, 2 * (position - DEPTH + 1))  # the oldest input that a row may use
        last, last_drew = self._last_weights, self._last_drew
        self._last_weights, self._last_drew = returned, noise.weight is not None
        largest = float(returned.abs().max())
        least = _NEGLIGIBLE * largest + 8 * noise.rounding  # |z| is below 8
        distant, last_distant = returned[:first], last[:first]
        if bool((distant.abs() > least).any()):
            if last_drew or not bool(last_distant.any()):
                return None
            multiple = distant @ last_distant / (last_distant @ last_distant)
            returned = returned - multiple * last
            returned[2 * position] += multiple
            if bool((returned[:first].abs() > least).any()):
                return None
        weights = returned[first : 2 * position + 2]
        weights = torch.where(weights.abs() > least, weights, 0.0)
        if not bool(torch.isfinite(weights).all()):
            return None
        newest_first = weights.reshape(-1, 2).flip(0).flatten().tolist()
        return tuple(newest_first + [0.0] * (2 * DEPTH - len(newest_first)))

    def _reproduces_the_random_entries(self) -> bool:
        """Return whether the rows reproduce the noise scheduler's results in the random entries."""
        rows, latents = self._rows, torch.stack(self._latents)
        noise = torch.stack(self._noise)
        weights = torch.tensor([row.weights for row in rows], dtype=torch.float64)
        # The sum of all terms, and that of their sizes, by which rounding errors are judged.
        expected, size = noise, noise.abs()
        for back in range(min(DEPTH, len(rows))):
            for column, each in ((2 * back, latents[:-1]), (2 * back + 1, self._preds)):
                term = torch.zeros_like(noise)
                term[back:] = weights[back:, column, None] * each[: len(rows) - back]
                expected, size = expected + term, size + term.abs()
        scales = torch.tensor([row.input_scale for row in rows], dtype=torch.float64)
        unscaled = torch.stack(self._model_inputs) - scales[:, None] * latents[:-1]
        return bool(
            ((latents[1:] - expected).abs() <= _TOLERANCE * size).all()
            and (unscaled.abs() <= _TOLERANCE * latents[:-1].abs()).all()
        )
