"""What a DreamBooth script uses of `torchvision.transforms`, for where torchvision is missing.

Pictures are PIL's until `ToTensor`; the same names, arguments and results, nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import numpy as np
import torch
from PIL import Image


class InterpolationMode(Enum):
    """How pixels are resampled."""

    NEAREST = Image.Resampling.NEAREST
    BILINEAR = Image.Resampling.BILINEAR
    BICUBIC = Image.Resampling.BICUBIC


class Compose:
    """One transform after the other."""

    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        self.transforms = transforms

    def __call__(self, picture: Any) -> Any:
        """The picture after all of them."""
        for transform in self.transforms:
            picture = transform(picture)
        return picture


class Resize:
    """The short side becomes `size` pixels, the aspect ratio stays."""

    def __init__(
        self, size: int, interpolation: InterpolationMode = InterpolationMode.BILINEAR
    ) -> None:
        self.size = size
        self.resample = interpolation.value

    def __call__(self, picture: Image.Image) -> Image.Image:
        """The picture, larger or smaller."""
        short = min(picture.size)
        width, height = (self.size * side // short for side in picture.size)
        return picture.resize((width, height), self.resample)


class CenterCrop:
    """A square of `size` pixels from the middle."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, picture: Image.Image) -> Image.Image:
        """The square."""
        left, top = ((side - self.size) // 2 for side in picture.size)
        return picture.crop((left, top, left + self.size, top + self.size))


class RandomCrop:
    """A square of `size` pixels from anywhere, drawn by torch's generator."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, picture: Image.Image) -> Image.Image:
        """The square."""
        left, top = (
            int(torch.randint(0, side - self.size + 1, (1,)).item()) for side in picture.size
        )
        return picture.crop((left, top, left + self.size, top + self.size))


class ToTensor:
    """uint8 0..255 -> float32 [3,H,W] 0..1."""

    def __call__(self, picture: Image.Image) -> torch.Tensor:
        """Pixels as numbers."""
        pixels = torch.from_numpy(np.array(picture.convert("RGB")))
        return pixels.permute(2, 0, 1).contiguous().float() / 255


class Normalize:
    """(x - mean) / std, per channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels around zero."""
        return (pixels - self.mean) / self.std
