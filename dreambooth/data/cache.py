"""Cache the latent posteriors of all pictures as mean and std, from which each step draws afresh.

Random crops stay random: a picture that is not square is encoded in several random crops, of which
each sample chooses one. Caching crops (instead of encoding them in each step) takes the VAE, nearly
half of a full-size step's work, out of the loop and out of the GPU's memory.

Legend: N cached crops of all pictures, B batch, C latent channels, h w latent cells, H W pixels.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from dreambooth.data import images, sample_draws
from dreambooth.data.seeds import derive_seed

_BLOCK_ROWS = 256  # 16 MiB of Stable Diffusion's latents

ReadMask = Callable[[Path, tuple[int, int]], Image.Image | None]
EncodeImage = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentPosteriors:
    """The latent posteriors of all cached crops.

    mean, std: float32 [N,C,h,w], unscaled, one row per crop. weights: float32 [N,1,h,w], of the
    loss in each latent cell, None where all are equal. first_rows: the row of each picture's
    first crop. crop_counts: the number of crops of each picture. groups: the pictures of each of
    several subjects; none for those of a single one.
    """

    mean: torch.Tensor
    std: torch.Tensor
    first_rows: tuple[int, ...]
    crop_counts: tuple[int, ...]
    groups: tuple[range, ...] = ()
    weights: torch.Tensor | None = None

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Return (C, h, w)."""
        _, channels, height, width = self.mean.shape
        return channels, height, width

    def sample(self, draws: sample_draws.SampleDraws) -> torch.Tensor:
        """Return latents [B,C,h,w], unscaled: mean + std * posterior_noise of the chosen crops."""
        rows = self._rows(draws)
        noise = sample_draws.onto(self.mean.device, draws.posterior_noise)
        return self.mean[rows] + self.std[rows] * noise

    def loss_weights(self, draws: sample_draws.SampleDraws) -> torch.Tensor | None:
        """Return the weights [B,1,h,w] of the chosen crops; None where all cells are equal."""
        return None if self.weights is None else self.weights[self._rows(draws)]

    def _rows(self, draws: sample_draws.SampleDraws) -> torch.Tensor:
        first_rows = torch.tensor([self.first_rows[int(image)] for image in draws.images])
        return sample_draws.onto(self.mean.device, first_rows + draws.crop_indices)

    def to(self, device: torch.device) -> LatentPosteriors:
        """Return the same posteriors on another device."""
        weights = None if self.weights is None else self.weights.to(device)
        return replace(self, mean=self.mean.to(device), std=self.std.to(device), weights=weights)


def to_pixels(picture: np.ndarray) -> torch.Tensor:
    """Convert uint8 0..255 [H,W,3] to float32 -1..1 [3,H,W]."""
    return torch.from_numpy(picture.copy()).permute(2, 0, 1).float() / 127.5 - 1.0


def crop_boxes(
    size: tuple[int, int],
    *,
    resolution: int,
    center: bool,
    crops_per_picture: int,
    seed: int,
    stream: str,
    key: str | int,
) -> list[tuple[int, int]]:
    """Return (left, top) of each crop to cache of a picture of `size`; one if there is no choice.

    The random numbers depend on (seed, stream, key) alone. key: the picture's number in its stream.
    """
    if center or size == (resolution, resolution):
        crops_per_picture = 1
    generator = random.Random(derive_seed(seed, stream, "crop", key))
    return [
        images.crop_offsets(size, resolution, center=center, random=generator)
        for _ in range(crops_per_picture)
    ]


def build(
    paths: Sequence[Path],
    *,
    resolution: int,
    center_crop: bool,
    crops_per_picture: int,
    seed: int,
    stream: str,
    encode_image: EncodeImage,
    known: Callable[[Path], torch.Tensor | None] = lambda path: None,
    sha256: Mapping[Path, bytes] = MappingProxyType({}),
    mask_of: ReadMask | None = None,
    on_image: Callable[[int], None] = lambda done: None,
) -> LatentPosteriors:
    """Encode every picture, with one picture in memory at a time.

    crops_per_picture: random crops to cache of a picture that is not square. stream: "instance" or
    "class", as in `sample_draws.draw`; each has its own random crops. encode_image: float32 -1..1
    [1,3,H,W] -> (mean, std) [1,C,h,w]. known: returns the unscaled latents [C,h,w] that a picture
    was decoded from, or None. Known latents replace the posterior, with std 0, and the picture is
    not opened. (Encoding it would return the same up to the VAE's own error, and the std is smaller
    than that error.)
    sha256: the hashes of the files when they were checked. mask_of: returns the mask, mode L, of a
    picture of a size (width, height), or None; without it no cell weighs more than another.
    on_image: called with the number of pictures done. Raises DatasetError, which names the file,
    for a picture that cannot be read.
    """
    means, stds, weights = _Rows(), _Rows(), _Rows()
    first_rows: list[int] = []
    crop_counts: list[int] = []
    for number, path in enumerate(paths):
        latents = known(path)
        if latents is not None:
            first_rows.append(means.count)
            crop_counts.append(1)
            means.append(latents)
            stds.append(torch.zeros_like(latents))
            on_image(number + 1)
            continue
        whole = images.open_image(path, sha256=sha256.get(path))
        mask = mask_of(path, whole.size) if mask_of is not None else None
        picture = images.resize(whole, resolution)
        mask = images.resize(mask, resolution) if mask is not None else None
        boxes = crop_boxes(
            picture.size,
            resolution=resolution,
            center=center_crop,
            crops_per_picture=crops_per_picture,
            seed=seed,
            stream=stream,
            key=number,
        )
        first_rows.append(means.count)
        crop_counts.append(len(boxes))
        for left, top in boxes:
            box = (left, top, left + resolution, top + resolution)
            crop = picture.crop(box)
            mean, std = encode_image(to_pixels(images.to_array(crop))[None])
            means.append(mean[0])
            stds.append(std[0])
            if mask_of is not None:
                cells = None if mask is None else mask.crop(box)
                weights.append(cell_weights(cells, mean.shape[-2:]))
        on_image(number + 1)
    return LatentPosteriors(
        mean=means.joined(),
        std=stds.joined(),
        first_rows=tuple(first_rows),
        crop_counts=tuple(crop_counts),
        weights=weights.joined() if mask_of is not None else None,
    )


def cell_weights(mask: Image.Image | None, cells: Sequence[int]) -> torch.Tensor:
    """Return the weight of the loss in each latent cell of a crop, float32 [1,h,w], of mean 1.

    mask: of the crop, mode L; None weighs all cells equally. cells: (h, w). A cell counts as the
    whitest of its pixels. A crop that shows nothing of the subject has equal weights too, so that
    no sample is lost.
    """
    ones = torch.ones(1, *cells)
    if mask is None:
        return ones
    pixels = torch.from_numpy(np.asarray(mask, dtype=np.float32) / 255)
    height, width = cells
    found = F.adaptive_max_pool2d(pixels[None], (height, width))
    mean = float(found.mean())
    return found / mean if mean > 0 else ones


class _Rows:
    """Collects tensors of one shape on the CPU, in float32, in large blocks.

    Keeping one small tensor after the large temporary ones of each picture fragments the heap:
    2,000 pictures of 512 x 512 took 3.7 GiB that way, and 0.5 GiB in blocks.
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
        """Return all tensors, stacked."""
        last = self.count - _BLOCK_ROWS * (len(self._blocks) - 1)
        return torch.cat([*self._blocks[:-1], self._blocks[-1][:last]])
