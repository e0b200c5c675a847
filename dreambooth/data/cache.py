"""The latent posteriors of all pictures, encoded once: mean and std, so every step draws afresh.

Random crops stay random: a picture that is not square is encoded in several random crops, among
which each sample chooses anew. Caching crops (instead of encoding on the fly) takes the VAE, nearly
half of a full-size step's work, out of the loop and out of the GPU's memory.

Legend: N cached crops of all pictures, B batch, C latent channels, h w latent cells, H W pixels.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dreambooth.data import images, pairs
from dreambooth.data.seeds import derive_seed

_BLOCK_ROWS = 256  # 16 MiB of Stable Diffusion's latents

EncodeImage = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentPosteriors:
    """mean, std: float32 [N,C,h,w], unscaled, one row per crop.

    first: row of each picture's first crop. crops: how many it has.
    """

    mean: torch.Tensor
    std: torch.Tensor
    first: tuple[int, ...]
    crops: tuple[int, ...]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        _, channels, height, width = self.mean.shape
        return channels, height, width

    def sample(self, samples: pairs.Samples) -> torch.Tensor:
        """Latents [B,C,h,w], unscaled: mean + std * posterior_noise of the chosen crops."""
        first = torch.tensor([self.first[int(image)] for image in samples.images])
        rows = pairs.onto(self.mean.device, first + samples.crops)
        noise = pairs.onto(self.mean.device, samples.posterior_noise)
        return self.mean[rows] + self.std[rows] * noise

    def to(self, device: torch.device) -> LatentPosteriors:
        """The same posteriors on another device."""
        return LatentPosteriors(
            mean=self.mean.to(device), std=self.std.to(device), first=self.first, crops=self.crops
        )


def to_pixels(picture: np.ndarray) -> torch.Tensor:
    """uint8 0..255 [H,W,3] -> float32 -1..1 [3,H,W]."""
    return torch.from_numpy(picture.copy()).permute(2, 0, 1).float() / 127.5 - 1.0


def crop_boxes(
    size: tuple[int, int],
    *,
    resolution: int,
    center: bool,
    crops: int,
    seed: int,
    stream: str,
    key: str | int,
) -> list[tuple[int, int]]:
    """(left, top) of each crop to cache of a picture of `size`: one where there is no choice.

    A function of (seed, stream, key) alone; key: the picture's number in its stream.
    """
    if center or size == (resolution, resolution):
        crops = 1
    generator = random.Random(derive_seed(seed, stream, "crop", key))
    return [
        images.crop_offsets(size, resolution, center=center, random=generator) for _ in range(crops)
    ]


def build(
    paths: Sequence[Path],
    *,
    resolution: int,
    center_crop: bool,
    crops: int,
    seed: int,
    stream: str,
    encode_image: EncodeImage,
    known: Callable[[Path], torch.Tensor | None] = lambda path: None,
    on_image: Callable[[int], None] = lambda done: None,
) -> LatentPosteriors:
    """Encode every picture; one picture is in memory at a time.

    crops: how many random crops to cache of a picture that is not square. stream: "instance" or
    "class", as in `pairs.draw`; each draws crops of its own. encode_image: float32 -1..1 [1,3,H,W]
    -> (mean, std) [1,C,h,w]. known: the unscaled latents [C,h,w] of a picture that was decoded
    from them, None for any other: they stand for its posterior, with std 0, and it is not opened.
    (Encoding gives back the same but for the VAE's own error; its std is smaller than that.)
    on_image is told the count of pictures done.
    Raises DatasetError, naming the file, where a picture cannot be read.
    """
    means, stds = _Rows(), _Rows()
    first: list[int] = []
    counts: list[int] = []
    for number, path in enumerate(paths):
        latents = known(path)
        if latents is not None:
            first.append(means.count)
            counts.append(1)
            means.append(latents)
            stds.append(torch.zeros_like(latents))
            on_image(number + 1)
            continue
        picture = images.resize(images.open_image(path), resolution)
        boxes = crop_boxes(
            picture.size,
            resolution=resolution,
            center=center_crop,
            crops=crops,
            seed=seed,
            stream=stream,
            key=number,
        )
        first.append(means.count)
        counts.append(len(boxes))
        for left, top in boxes:
            crop = picture.crop((left, top, left + resolution, top + resolution))
            mean, std = encode_image(to_pixels(images.to_array(crop))[None])
            means.append(mean[0])
            stds.append(std[0])
        on_image(number + 1)
    return LatentPosteriors(
        mean=means.joined(), std=stds.joined(), first=tuple(first), crops=tuple(counts)
    )


class _Rows:
    """Tensors of one shape on the CPU, in float32, kept in large blocks.

    One small tensor kept after each picture's large, passing ones leaves the heap in pieces that
    no next picture fits into: 2,000 pictures of 512 x 512 took 3.7 GiB so, and 0.5 in blocks.
    """

    def __init__(self) -> None:
        self.count = 0
        self._blocks: list[torch.Tensor] = []

    def append(self, row: torch.Tensor) -> None:
        """Copy one tensor to the end."""
        place = self.count % _BLOCK_ROWS
        if place == 0:
            self._blocks.append(torch.empty((_BLOCK_ROWS, *row.shape)))
        self._blocks[-1][place] = row
        self.count += 1

    def joined(self) -> torch.Tensor:
        """All of them, stacked."""
        last = self.count - _BLOCK_ROWS * (len(self._blocks) - 1)
        return torch.cat([*self._blocks[:-1], self._blocks[-1][:last]])
