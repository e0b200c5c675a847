"""Reading the table of a schedule off diffusers' own noise scheduler.

It is driven through its steps with unit vectors, which show the weights, and with random numbers:
only what they confirm is believed.
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

ROWS_AT_ONCE = 32  # so many steps take about 10 ms to read
_RANDOM, _SILENT = 32, 32  # lanes besides the unit vectors: to check with, and to hear noise in
_NOTHING = 1e-9  # a weight that is a rounding error, against the largest of its row
_ALIKE = 1e-5  # noise schedulers compute their own numbers in float32


def read(noise_scheduler: Any, num_inference_steps: int, *, eta: float = 0.0) -> Schedule:
    """Set a fresh noise scheduler of diffusers to its steps, and read its table."""
    schedule = None
    reader = Reader(noise_scheduler, num_inference_steps, eta=eta)
    while schedule is None:
        schedule = reader.read_on(ROWS_AT_ONCE)
    return schedule


@functools.cache
def _step_parameters(scheduler_class: Any) -> frozenset[str]:
    return frozenset(inspect.signature(scheduler_class.step).parameters)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Heard:
    """Noise in what a step made. weight: c, None without a draw. drawn: c * z in all lanes.

    rounding: what of it is lost to rounding at most, by which the other lanes are wrong, too.
    """

    weight: float | None
    drawn: Tensor
    rounding: float


class Reader:
    """Drives a noise scheduler through all its steps once, in float64.

    Latents and predictions are one line of lanes. Lane 2 n is 1 in the n-th latents and 0 in all
    others, lane 2 n + 1 likewise in the n-th prediction: in what comes out they show the weights.
    In the random lanes, the next ones, a picture walks. The last lanes are silent (0): what is
    heard there is noise.
    """

    def __init__(self, noise_scheduler: Any, num_inference_steps: int, *, eta: float) -> None:
        """Take a fresh noise scheduler of diffusers."""
        kind: Any = type(noise_scheduler)
        known = _step_parameters(kind)
        timesteps = timesteps_of(noise_scheduler, num_inference_steps)
        self._schedule = Schedule(
            template=noise_scheduler,
            timesteps=timesteps,
            moments=tuple(timesteps.tolist()),
            rows=None,
            depth=0,
            options={"eta": eta} if "eta" in known else {},
            takes_generator="generator" in known,
        )
        self._noise_scheduler = self._schedule.noise_scheduler()
        self._generator = torch.Generator("cpu").manual_seed(0)
        self._rows: list[StepRow] = []
        steps = len(timesteps)
        self._units = 2 * steps
        self._random = slice(self._units, self._units + _RANDOM)
        draws = torch.Generator("cpu").manual_seed(1)
        # Small numbers and large ones: what is clipped is clipped in these.
        sizes = torch.tensor([1.0, 1000.0], dtype=torch.float64).repeat(_RANDOM // 2)
        self._preds = torch.randn(steps, _RANDOM, generator=draws, dtype=torch.float64) * sizes
        self._walk = [torch.randn(_RANDOM, generator=draws, dtype=torch.float64) * sizes]
        self._scaled: list[Tensor] = []  # the picture's latents as the U-Net would see them
        self._noise: list[Tensor] = []  # what the picture got of it
        self._last = torch.zeros(self._units, dtype=torch.float64)  # made of units a step ago
        self._last_drew = False

    @torch.no_grad()
    def read_on(self, most_steps: int) -> Schedule | None:
        """Read at most so many steps more; return the schedule at the end, without a table if it
        has none.
        """
        first = len(self._rows)
        for position in range(first, min(first + most_steps, len(self._schedule.moments))):
            row = self._row(position)
            if row is None:
                return self._schedule
            self._rows.append(row)
        if len(self._rows) < len(self._schedule.moments):
            return None
        if not self._explained():
            return self._schedule
        reach = max((row.used.bit_length() + 1) // 2 for row in self._rows)
        return dataclasses.replace(self._schedule, rows=tuple(self._rows), depth=max(0, reach - 1))

    def _row(self, position: int) -> StepRow | None:
        """Take one step; None if it can have no row."""
        latents = self._lanes(2 * position, self._walk[-1])
        pred = self._lanes(2 * position + 1, self._preds[position])
        timestep = self._schedule.timesteps[position]
        scaled = self._noise_scheduler.scale_model_input(latents, timestep).double().flatten()
        before = self._generator.get_state()
        options = self._schedule.step_options(self._generator)
        made = self._noise_scheduler.step(pred, timestep, latents, **options, return_dict=False)[0]
        out = made.double().flatten()
        heard = self._heard(out, before)
        if heard is None:
            return None
        self._walk.append(out[self._random])
        self._scaled.append(scaled[self._random])
        self._noise.append(heard.drawn[self._random])
        weights = self._weights((out - heard.drawn)[: self._units], position, heard)
        if weights is None:
            return None
        return StepRow(
            weights=weights,
            used=sum(1 << k for k, weight in enumerate(weights) if weight),
            input_scale=float(scaled[2 * position]),
            noise=heard.weight,
        )

    def _lanes(self, unit: int, random: Tensor) -> Tensor:
        """[1, 1, 1, lanes] with a 1 at `unit`."""
        lanes = torch.zeros(self._units + _RANDOM + _SILENT, dtype=torch.float64)
        lanes[unit] = 1.0
        lanes[self._random] = random
        return lanes.reshape(1, 1, 1, -1)

    def _heard(self, out: Tensor, before: Tensor) -> _Heard | None:
        """The noise in what was made; None if it is not understood."""
        silent = out[-_SILENT:]
        if torch.equal(self._generator.get_state(), before):
            nothing = _Heard(weight=None, drawn=torch.zeros_like(out), rounding=0.0)
            return None if bool(silent.any()) else nothing
        for dtype, rounding in ((torch.float64, 1e-9), (torch.float32, 1e-6)):
            again = torch.Generator("cpu")
            again.set_state(before)
            drawn = (
                torch.randn((1, 1, 1, len(out)), generator=again, dtype=dtype).double().flatten()
            )
            ear = drawn[-_SILENT:]
            weight = float(silent @ ear / (ear @ ear))
            rounding *= abs(weight)
            if bool(((silent - weight * ear).abs() <= rounding * ear.abs()).all()):
                return _Heard(weight=weight, drawn=weight * drawn, rounding=rounding)
        return None

    def _weights(self, made: Tensor, position: int, heard: _Heard) -> tuple[float, ...] | None:
        """a_0, b_0, a_1, b_1, ... of a step that made this of the unit vectors.

        UniPC reaches back to the first step through latents that it corrects in secret, but these
        differ from those that it gave away by a known sum: what it gave away last, less what that
        was made of, is nothing, and so much of nothing is added that the distant past goes.
        """
        first = max(0, 2 * (position - DEPTH + 1))
        last, last_drew = self._last, self._last_drew
        self._last, self._last_drew = made, heard.weight is not None
        least = _NOTHING * float(made.abs().max()) + 8 * heard.rounding  # noise is below 8
        distant, last_distant = made[:first], last[:first]
        if bool((distant.abs() > least).any()):
            if last_drew or not bool(last_distant.any()):
                return None
            share = distant @ last_distant / (last_distant @ last_distant)
            made = made - share * last
            made[2 * position] += share
            if bool((made[:first].abs() > least).any()):
                return None
        numbers = made[first : 2 * position + 2]
        numbers = torch.where(numbers.abs() > least, numbers, 0.0)
        if not bool(torch.isfinite(numbers).all()):
            return None
        newest_first = numbers.reshape(-1, 2).flip(0).flatten().tolist()
        return tuple(newest_first + [0.0] * (2 * DEPTH - len(newest_first)))

    def _explained(self) -> bool:
        """Whether the picture in the random lanes walked where the table says."""
        rows, walk, noise = self._rows, torch.stack(self._walk), torch.stack(self._noise)
        weights = torch.tensor([row.weights for row in rows], dtype=torch.float64)
        told, size = noise, noise.abs()
        for back in range(min(DEPTH, len(rows))):
            for column, each in ((2 * back, walk[:-1]), (2 * back + 1, self._preds)):
                term = torch.zeros_like(noise)
                term[back:] = weights[back:, column, None] * each[: len(rows) - back]
                told, size = told + term, size + term.abs()
        scales = torch.tensor([row.input_scale for row in rows], dtype=torch.float64)
        unscaled = torch.stack(self._scaled) - scales[:, None] * walk[:-1]
        return bool(
            ((walk[1:] - told).abs() <= _ALIKE * size).all()
            and (unscaled.abs() <= _ALIKE * walk[:-1].abs()).all()
        )
