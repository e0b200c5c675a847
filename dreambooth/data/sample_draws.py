"""Draw the picture, crop, timestep and noise of each sample from the seed and its number alone.

Nothing here keeps state, so a run that is stopped and resumed draws what an unbroken run draws,
and four micro-batches of one draw what one micro-batch of four draws. Instance and class images
are two streams that are shuffled independently. Several subjects take turns, sample by sample, so
that each has as many samples as the others, however many pictures it has.

Legend: B batch, C latent channels, h w latent cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from dreambooth.data.seeds import derive_seed


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleDraws:
    """The random choices of B samples of one stream; all tensors are on the CPU.

    images: int64 [B], index of the picture. crop_indices: int64 [B], index of its cached crop.
    timesteps: int64 [B], 0..train_timesteps-1. posterior_noise and noise: float32 [B,C,h,w],
    standard normal: the draw from the latent posterior, and the noise that is added.
    """

    images: torch.Tensor
    crop_indices: torch.Tensor
    timesteps: torch.Tensor
    posterior_noise: torch.Tensor
    noise: torch.Tensor


@lru_cache(maxsize=64)  # of all subjects and their classes
def _order(seed: int, stream: str, round_number: int, count: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(derive_seed(seed, stream, "order", round_number))
    return tuple(torch.randperm(count, generator=generator).tolist())


def picture_of(number: int, *, seed: int, stream: str, count: int) -> int:
    """Return the picture of sample `number`; each round over `count` has a new order.

    The order continues across epochs, so no accumulation window is ever shorter than the others.
    """
    round_number, position = divmod(number, count)
    return _order(seed, stream, round_number, count)[position]


def subject_of(number: int, subjects: int) -> tuple[int, int]:
    """Return the subject of sample `number`, and the number of this sample among the subject's."""
    of_subject, subject = divmod(number, subjects)
    return subject, of_subject


def _picture_in_turn(number: int, groups: Sequence[range], *, seed: int, stream: str) -> int:
    """Return the picture of sample `number`, from the group of the subject whose turn it is.

    Subjects that share a group, as those of one class share its images, take turns with it.
    """
    subject, turn = subject_of(number, len(groups))
    group = groups[subject]
    turn = turn * groups.count(group) + groups[:subject].count(group)
    return group.start + picture_of(turn, seed=seed, stream=stream, count=len(group))


def draw(
    numbers: range,
    *,
    seed: int,
    stream: str,
    crop_counts: Sequence[int],
    latent_shape: tuple[int, int, int],
    train_timesteps: int,
    groups: Sequence[range] = (),
) -> SampleDraws:
    """Draw the samples of one micro-batch.

    numbers: the numbers of the samples in their stream, counted from the start of the run.
    stream: "instance" or "class". crop_counts: how many cached crops each picture has.
    latent_shape: (C, h, w). groups: the pictures of each subject; none for those of a single one.
    """
    groups = groups or (range(len(crop_counts)),)
    images, crop_indices, timesteps, posterior_noise, noise = [], [], [], [], []
    for number in numbers:
        picture = _picture_in_turn(number, groups, seed=seed, stream=stream)
        generator = torch.Generator().manual_seed(derive_seed(seed, stream, "sample", number))
        images.append(picture)
        crop_indices.append(int(torch.randint(crop_counts[picture], (1,), generator=generator)))
        timesteps.append(int(torch.randint(train_timesteps, (1,), generator=generator)))
        posterior_noise.append(torch.randn(latent_shape, generator=generator))
        noise.append(torch.randn(latent_shape, generator=generator))
    return SampleDraws(
        images=torch.tensor(images),
        crop_indices=torch.tensor(crop_indices),
        timesteps=torch.tensor(timesteps),
        posterior_noise=torch.stack(posterior_noise),
        noise=torch.stack(noise),
    )


def sample_numbers(
    *,
    step: int,
    micro_batch: int,
    batch_size: int,
    micro_batches: int,
    process: int,
    processes: int,
) -> range:
    """Return the sample numbers of one micro-batch, which no other step or process uses."""
    first = ((step * micro_batches + micro_batch) * processes + process) * batch_size
    return range(first, first + batch_size)


def onto(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """Move a CPU tensor to the training device without waiting for that device's pending work."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
