"""Replace the part of `torchvision.transforms` that a DreamBooth script uses, if it is missing.

Names, arguments and results are those of torchvision. Pictures are PIL's until `ToTensor`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import numpy as np
import torch
from PIL import Image


class InterpolationMode(Enum):
    """The ways to resample pixels."""

    NEAREST = Image.Resampling.NEAREST
    BILINEAR = Image.Resampling.BILINEAR
    BICUBIC = Image.Resampling.BICUBIC


class Compose:
    """Applies one transform after the other."""

    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        self.transforms = transforms

    def __call__(self, picture: Any) -> Any:
        """Apply all transforms to the picture."""
        for transform in self.transforms:
            picture = transform(picture)
        return picture


class Resize:
    """Resizes the short side to `size` pixels and keeps the aspect ratio."""

    def __init__(
        self, size: int, interpolation: InterpolationMode = InterpolationMode.BILINEAR
    ) -> None:
        self.size = size
        self.resample = interpolation.value

    def __call__(self, picture: Image.Image) -> Image.Image:
        """Resize the picture."""
        short = min(picture.size)
        width, height = (self.size * side // short for side in picture.size)
        return picture.resize((width, height), self.resample)


class CenterCrop:
    """Crops a square of `size` pixels from the middle."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, picture: Image.Image) -> Image.Image:
        """Crop the picture."""
        left, top = ((side - self.size) // 2 for side in picture.size)
        return picture.crop((left, top, left + self.size, top + self.size))


class RandomCrop:
    """Crops a square of `size` pixels at a place that torch's generator chooses."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, picture: Image.Image) -> Image.Image:
        """Crop the picture."""
        left, top = (
            int(torch.randint(0, side - self.size + 1, (1,)).item()) for side in picture.size
        )
        return picture.crop((left, top, left + self.size, top + self.size))


class ToTensor:
    """Converts uint8, 0..255, to float32 [3,H,W], 0..1."""

    def __call__(self, picture: Image.Image) -> torch.Tensor:
        """Return the pixels as a tensor."""
        pixels = torch.from_numpy(np.array(picture.convert("RGB")))
        return pixels.permute(2, 0, 1).contiguous().float() / 255


class Normalize:
    """Computes (x - mean) / std for each channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the normalised pixels."""
        return (pixels - self.mean) / self.std
