"""Pictures on their way from noise: where each stands, and how any of them take a step at once.

Pictures whose schedules have tables travel as a group, stacked: one short expression moves all of
them, wherever each stands. It is made of multiplications and additions of equal places, so that no
bit of a picture depends on who else is there. The others are moved one by one, by a noise scheduler
of diffusers each. All of it is in float32.

Legend: B pictures, C latent channels, h w latent cells.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dreambooth.diffusion.step_tables import Schedule, StepRow

Past = list[tuple[Tensor, Tensor]]  # latents and predictions of the steps before, newest first


class Trajectory:
    """One picture on its way through its schedule.

    position: steps taken. generator: of the noise that its noise scheduler may draw on the way.
    """

    def __init__(self, schedule: Schedule, latents: Tensor, generator: torch.Generator) -> None:
        """Stand at the first step with latents float32 [1, C, h, w]."""
        self.schedule = schedule
        self.generator = generator
        self.position = 0
        self._latents: Tensor | None = latents
        self._noise_scheduler: Any = None
        if schedule.rows is None:
            self._noise_scheduler = schedule.noise_scheduler()
        self._group: _Group | None = None
        self._place = 0

    @property
    def latents(self) -> Tensor:
        """Noisy but for the end: float32 [1, C, h, w]."""
        if self._latents is not None:
            return self._latents
        assert self._group is not None
        return self._group.latents[self._place : self._place + 1]

    @property
    def finished(self) -> bool:
        """Whether every step has been taken."""
        return self.position >= len(self.schedule.timestep_values)

    def past(self) -> Past:
        """Return what the steps to come may need: [1, C, h, w] each."""
        if self._group is None:
            return []
        mine = slice(self._place, self._place + 1)
        return [(latents[mine], preds[mine]) for latents, preds in self._group.past]

    def join(self, group: _Group, place: int) -> None:
        """Let a group keep the latents from now on."""
        self._group, self._place, self._latents = group, place, None

    def leave(self) -> None:
        """Keep the latents alone: a group may be larger than what is left of it."""
        self._latents, self._group = self.latents.clone(), None

    def group_of(self, trajectories: Sequence[Trajectory]) -> _Group | None:
        """Return the group of exactly these, in this order, if this is one of its members."""
        group = self._group
        if group is None or len(group.latents) != len(trajectories):
            return None
        for place, each in enumerate(trajectories):
            if each._group is not group or each._place != place:
                return None
        return group

    def model_input_alone(self) -> Tensor:
        """Return what the U-Net wants to see of a picture without a table: as `latents`."""
        timestep = self.schedule.timesteps[self.position]
        scaled: Tensor = self._noise_scheduler.scale_model_input(self.latents, timestep)
        return scaled

    def step_alone(self, pred: Tensor) -> None:
        """Move a picture without a table; half of a step that fails cannot be taken back."""
        # A caller's autocast would round parts of the mathematics (einsum in UniPC) to half.
        kind = pred.device.type
        rounding = torch.is_autocast_enabled(kind)
        with torch.autocast(kind, enabled=False) if rounding else contextlib.nullcontext():
            self._latents = self._noise_scheduler.step(
                pred,
                self.schedule.timesteps[self.position],
                self.latents,
                **self.schedule.step_options(self.generator),
                return_dict=False,
            )[0]
        self.position += 1


class _Group:
    """Pictures that have tables: their latents, float32 [B, C, h, w], and their past, stacked.

    It does not know its members, who know it: nothing then outlives them.
    """

    def __init__(self, members: Sequence[Trajectory]) -> None:
        """Stack what they bring along; zeros stand where one has less of a past."""
        self.latents = torch.cat([each.latents for each in members])
        self._depth = max(each.schedule.depth for each in members)
        pasts = [each.past() for each in members]
        self.past: Past = []
        for back in range(min(self._depth, max(map(len, pasts)))):
            both = [
                past[back] if back < len(past) else (torch.zeros_like(each.latents),) * 2
                for past, each in zip(pasts, members, strict=True)
            ]
            latents, preds = zip(*both, strict=True)
            self.past.append((torch.cat(latents), torch.cat(preds)))
        for place, each in enumerate(members):
            each.join(self, place)

    def model_input(self, rows: Sequence[StepRow]) -> Tensor:
        """Return what the U-Net wants to see, [B, C, h, w]."""
        scales = [row.input_scale for row in rows]
        if all(scale == 1.0 for scale in scales):
            return self.latents
        (scale,) = self._columns(scales)
        return self.latents * scale

    def step(self, rows: Sequence[StepRow], preds: Tensor, noise: Tensor | None) -> None:
        """Move all; nothing has changed where this raises. noise: [B, C, h, w] if any is drawn."""
        inputs = [self.latents, preds, *(each for pair in self.past for each in pair)]
        used = functools.reduce(operator.or_, (row.used for row in rows))
        terms = [k for k in range(len(inputs)) if used >> k & 1]
        numbers = [row.weights[k] for k in terms for row in rows]
        given = [inputs[k] for k in terms]
        if noise is not None:
            numbers += [row.noise or 0.0 for row in rows]
            given.append(noise)
        weights = self._columns(numbers)
        latents = given[0] * weights[0]
        # Not addcmul: whether it rounds once or twice may depend on where in a vector a place is.
        term = torch.empty_like(latents)
        for each, weight in zip(given[1:], weights[1:], strict=True):
            latents += torch.mul(each, weight, out=term)
        self.past = [(self.latents, preds), *self.past][: self._depth]
        self.latents = latents

    def _columns(self, numbers: list[float]) -> tuple[Tensor, ...]:
        """One number per picture and column, column by column, as float32 [B, 1, 1, 1]."""
        count = len(self.latents)
        columns = torch.tensor(numbers, dtype=torch.float32).reshape(-1, count, 1, 1, 1)
        return columns.to(self.latents.device, non_blocking=True).unbind()


def can_step_together(trajectories: Sequence[Trajectory]) -> bool:
    """Whether `step` moves all of them at once, so that all have moved or none has."""
    return all(each.schedule.rows is not None for each in trajectories)


def model_input(trajectories: Sequence[Trajectory]) -> Tensor:
    """Return the latents as the U-Net wants to see them: float32 [B, C, h, w], to be read only."""
    if not can_step_together(trajectories):
        return torch.cat([_alone(each) for each in trajectories])
    return _group(trajectories).model_input(_rows(trajectories))


def timesteps(trajectories: Sequence[Trajectory]) -> Tensor:
    """Return the training timesteps at which pictures of one model stand, [B], on the CPU."""
    values = [each.schedule.timestep_values[each.position] for each in trajectories]
    return torch.tensor(values, dtype=trajectories[0].schedule.timesteps.dtype)


def step(trajectories: Sequence[Trajectory], preds: Tensor) -> None:
    """Move every picture one step, given the guided predictions float32 [B, C, h, w].

    Predictions are remembered and must not be written to afterwards.
    """
    if not can_step_together(trajectories):
        for each, pred in zip(trajectories, torch.split(preds, 1), strict=True):
            if each.schedule.rows is None:
                each.step_alone(pred)
            else:
                step([each], pred)
        return
    rows = _rows(trajectories)
    group = _group(trajectories)
    with _noise(trajectories, rows, preds) as noise:
        group.step(rows, preds, noise)
    for each in trajectories:
        each.position += 1
        if each.finished:
            each.leave()


def _alone(trajectory: Trajectory) -> Tensor:
    if trajectory.schedule.rows is None:
        return trajectory.model_input_alone()
    return model_input([trajectory])


def _rows(trajectories: Sequence[Trajectory]) -> list[StepRow]:
    return [
        each.schedule.rows[each.position] for each in trajectories if each.schedule.rows is not None
    ]


def _group(trajectories: Sequence[Trajectory]) -> _Group:
    """The group that these have been in, or a new one."""
    return trajectories[0].group_of(trajectories) or _Group(trajectories)


@contextlib.contextmanager
def _noise(
    trajectories: Sequence[Trajectory], rows: Sequence[StepRow], like: Tensor
) -> Iterator[Tensor | None]:
    """Noise for those whose step draws some, as diffusers draws it; taken back on an exception."""
    drawing = [place for place, row in enumerate(rows) if row.noise is not None]
    if not drawing:
        yield None
        return
    before = [trajectories[place].generator.get_state() for place in drawing]
    try:
        noise = torch.zeros(like.shape)
        for place in drawing:
            noise[place].normal_(generator=trajectories[place].generator)
        yield noise.to(like.device, non_blocking=True)
    except BaseException:
        for place, state in zip(drawing, before, strict=True):
            trajectories[place].generator.set_state(state)
        raise
