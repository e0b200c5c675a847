"""Defines the judge, a small classifier of 64x64 pictures of the embedded world, and loads it.

Its attributes, their labels and its training are in `tiny_world.judge`. This module is what a score
of the embedded model needs: it turns pictures into features.

Legend: B batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

JUDGE_WEIGHTS = Path(__file__).parent / "judge_weights" / "judge.safetensors"
FEATURES = 96

Pictures = npt.NDArray[np.uint8]


class Judge(nn.Module):
    """Five convolutions, a hidden layer and a linear head per attribute; about 0.6 M parameters."""

    def __init__(self, heads: Mapping[str, int]) -> None:
        """Take the number of labels of each attribute."""
        super().__init__()
        widths = (3, 32, 48, 96, 128, 160)
        strides = (2, 1, 2, 2, 2)
        layers: list[nn.Module] = []
        for (before, after), stride in zip(pairwise(widths), strides, strict=True):
            layers += [
                nn.Conv2d(before, after, 3, stride=stride, padding=1),
                nn.GroupNorm(8, after),
                nn.SiLU(),
            ]
        self.features = nn.Sequential(*layers)
        self.hidden = nn.Sequential(
            nn.Flatten(), nn.Dropout(0.2), nn.Linear(widths[-1] * 16, FEATURES), nn.SiLU()
        )
        self.heads = nn.ModuleDict(
            {name: nn.Linear(FEATURES, labels) for name, labels in heads.items()}
        )

    def embed(self, pixels: Tensor) -> Tensor:
        """Return features [B,96] of pixels float32 [B,3,64,64] in -1..1."""
        features: Tensor = self.hidden(self.features(pixels))
        return features

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return logits [B,labels] by attribute, of pixels float32 [B,3,64,64] in -1..1."""
        features = self.embed(pixels)
        return {name: head(features) for name, head in self.heads.items()}


def to_pixels(pictures: Pictures) -> Tensor:
    """Convert pictures uint8 [B,64,64,3] to pixels float32 [B,3,64,64] in -1..1."""
    return torch.tensor(pictures).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def load(path: Path = JUDGE_WEIGHTS) -> Judge:
    """Load the committed judge; its weights are stored in half precision and used in single."""
    tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    heads = {
        name.split(".")[1]: len(tensor)
        for name, tensor in tensors.items()
        if name.startswith("heads.") and name.endswith(".bias")
    }
    judge = Judge(heads)
    judge.load_state_dict(tensors)
    return judge.eval()


def save(judge: Judge, path: Path = JUDGE_WEIGHTS) -> None:
    """Write the judge in half precision."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.half().contiguous() for name, tensor in judge.state_dict().items()}
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)
