"""Pictures that are being denoised: their positions, and steps of several of them at once.

Pictures whose schedules have tables are stacked into a group: one short expression advances all of
them, whatever their positions. It consists of elementwise multiplications and additions, so no bit
of a picture depends on which others are in the group. Pictures without tables are advanced one by
one, each by its own noise scheduler of diffusers. All of this is in float32.

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

Past = list[tuple[Tensor, Tensor]]  # latents and predictions of past steps, newest first


class Trajectory:
    """One picture and its position in its schedule.

    position: steps taken. generator: for the noise that its noise scheduler may draw.
    """

    def __init__(self, schedule: Schedule, latents: Tensor, generator: torch.Generator) -> None:
        """Start at the first step with latents float32 [1, C, h, w]."""
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
        """Return the latents, float32 [1, C, h, w]; they are noisy until the last step is taken."""
        if self._latents is not None:
            return self._latents
        assert self._group is not None
        return self._group.latents[self._place : self._place + 1]

    @property
    def finished(self) -> bool:
        """Return whether every step has been taken."""
        return self.position >= len(self.schedule.timestep_values)

    def past(self) -> Past:
        """Return what later steps may need of past ones, [1, C, h, w] each."""
        if self._group is None:
            return []
        mine = slice(self._place, self._place + 1)
        return [(latents[mine], preds[mine]) for latents, preds in self._group.past]

    def join(self, group: _Group, place: int) -> None:
        """Keep the latents in a group from now on, at index `place`."""
        self._group, self._place, self._latents = group, place, None

    def leave(self) -> None:
        """Copy the latents out of the group, so that they do not keep all of it in memory."""
        self._latents, self._group = self.latents.clone(), None

    def group_of(self, trajectories: Sequence[Trajectory]) -> _Group | None:
        """Return this picture's group if it holds exactly these, in this order, else None."""
        group = self._group
        if group is None or len(group.latents) != len(trajectories):
            return None
        for place, each in enumerate(trajectories):
            if each._group is not group or each._place != place:
                return None
        return group

    def model_input_alone(self) -> Tensor:
        """Return the U-Net's input for a picture without a table, shaped as `latents`."""
        timestep = self.schedule.timesteps[self.position]
        scaled: Tensor = self._noise_scheduler.scale_model_input(self.latents, timestep)
        return scaled

    def step_alone(self, pred: Tensor) -> None:
        """Advance a picture without a table; a step that fails halfway cannot be undone."""
        # A caller's autocast would run parts of the step (einsum in UniPC) in half precision.
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
    """Pictures with tables: their latents, float32 [B, C, h, w], and past, stacked.

    The members refer to the group and not the other way round, so the last of them frees it.
    """

    def __init__(self, members: Sequence[Trajectory]) -> None:
        """Stack latents and pasts of the members; zeros fill in where a member has less past."""
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
        """Return the U-Net's input, [B, C, h, w]."""
        scales = [row.input_scale for row in rows]
        if all(scale == 1.0 for scale in scales):
            return self.latents
        (scale,) = self._columns(scales)
        return self.latents * scale

    def step(self, rows: Sequence[StepRow], preds: Tensor, noise: Tensor | None) -> None:
        """Advance all; if this raises, nothing has changed. noise: [B, C, h, w] if any is drawn."""
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
        # Not addcmul: whether it rounds once or twice may depend on an element's place in memory.
        term = torch.empty_like(latents)
        for each, weight in zip(given[1:], weights[1:], strict=True):
            latents += torch.mul(each, weight, out=term)
        self.past = [(self.latents, preds), *self.past][: self._depth]
        self.latents = latents

    def _columns(self, numbers: list[float]) -> tuple[Tensor, ...]:
        """Return one float32 [B, 1, 1, 1] per column; `numbers` has B numbers per column."""
        count = len(self.latents)
        columns = torch.tensor(numbers, dtype=torch.float32).reshape(-1, count, 1, 1, 1)
        return columns.to(self.latents.device, non_blocking=True).unbind()


def can_step_together(trajectories: Sequence[Trajectory]) -> bool:
    """Return whether `step` advances all at once, so that either all or none have advanced."""
    return all(each.schedule.rows is not None for each in trajectories)


def model_input(trajectories: Sequence[Trajectory]) -> Tensor:
    """Return the U-Net's input, float32 [B, C, h, w]; it must not be written to."""
    if not can_step_together(trajectories):
        return torch.cat([_alone(each) for each in trajectories])
    return _group(trajectories).model_input(_rows(trajectories))


def timesteps(trajectories: Sequence[Trajectory]) -> Tensor:
    """Return the current timesteps of pictures of one model, [B], on the CPU."""
    values = [each.schedule.timestep_values[each.position] for each in trajectories]
    return torch.tensor(values, dtype=trajectories[0].schedule.timesteps.dtype)


def step(trajectories: Sequence[Trajectory], preds: Tensor) -> None:
    """Advance every picture by one step, given the guided predictions float32 [B, C, h, w].

    Predictions are kept for later steps and must not be written to afterwards.
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
    """Return the group that these pictures already form, or a new one."""
    return trajectories[0].group_of(trajectories) or _Group(trajectories)


@contextlib.contextmanager
def _noise(
    trajectories: Sequence[Trajectory], rows: Sequence[StepRow], like: Tensor
) -> Iterator[Tensor | None]:
    """Yield the noise for pictures whose step draws some, drawn as diffusers draws it.

    An exception in the block sets their generators back.
    """
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
