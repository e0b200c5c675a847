"""EfficientNet-Lite0 (Tan and Le 2019; the Lite variant has ReLU6 and no squeeze-and-excitation).

It gives features of photographs, and the probabilities of ImageNet's 1,000 classes. Its weights lie
in `efficientnet_lite0/`, whose README.md says where they come from. Batch normalisations are folded
into the convolutions before them.

Legend: B pictures, C channels, H W pixels.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

WEIGHTS = Path(__file__).parent / "efficientnet_lite0" / "model.safetensors"
SIDE = 224  # pixels
WIDTH = 1280  # of a feature
CLASSES = 1000

# For each stage: channels, blocks, the first block's stride, kernel, expansion (table 1).
_STAGES = (
    *((16, 1, 1, 3, 1), (24, 2, 2, 3, 6), (40, 2, 2, 5, 6), (80, 3, 2, 3, 6)),
    *((112, 3, 1, 5, 6), (192, 4, 2, 5, 6), (320, 1, 1, 3, 6)),
)


class _Convolution(nn.Conv2d):
    """A convolution with TensorFlow's "same" padding: the odd pixel is added at the end."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Map [B,C,H,W] to [B,C',ceil(H/stride),ceil(W/stride)]."""
        edges: list[int] = []
        sizes = (hidden.shape[3], hidden.shape[2])  # `pad` begins with the last dimension
        for size, kernel, stride in zip(sizes, self.kernel_size, self.stride, strict=True):
            missing = max(0, (math.ceil(size / stride) - 1) * stride + kernel - size)
            edges += [missing // 2, missing - missing // 2]
        return conv2d(pad(hidden, edges), self.weight, self.bias, self.stride, 0, 1, self.groups)


class _Block(nn.Module):
    """An inverted residual block (Sandler et al. 2018, figure 3b)."""

    def __init__(self, channels: int, out: int, stride: int, kernel: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        self.expand = _Convolution(channels, wide, 1) if expansion > 1 else None
        self.depthwise = _Convolution(wide, wide, kernel, stride, groups=wide)
        self.project = _Convolution(wide, out, 1)
        self._adds = stride == 1 and channels == out

    def forward(self, hidden: Tensor) -> Tensor:
        """Map [B,C,H,W] to [B,C',H',W']."""
        made: Tensor = hidden if self.expand is None else self.expand(hidden).clamp(0, 6)
        made = self.project(self.depthwise(made).clamp(0, 6))
        if self._adds:
            made = hidden + made
        return made


class EfficientNetLite0(nn.Module):
    """The whole network: pictures float32 [B,3,224,224] in -1..1 to logits [B,1000]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _Convolution(3, 32, 3, 2)
        blocks, channels = [], 32
        for out, count, stride, kernel, expansion in _STAGES:
            for number in range(count):
                blocks.append(_Block(channels, out, 1 if number else stride, kernel, expansion))
                channels = out
        self.blocks = nn.Sequential(*blocks)
        self.head = _Convolution(channels, WIDTH, 1)
        self.classes = nn.Linear(WIDTH, CLASSES)

    def features(self, pixels: Tensor) -> Tensor:
        """Return the pooled features [B,1280] of pictures [B,3,224,224] in -1..1."""
        hidden = self.blocks(self.stem(pixels).clamp(0, 6))
        pooled: Tensor = self.head(hidden).clamp(0, 6).mean(dim=(2, 3))
        return pooled

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the logits [B,1000] of pictures [B,3,224,224] in -1..1."""
        logits: Tensor = self.classes(self.features(pixels))
        return logits


def load(device: torch.device) -> EfficientNetLite0:
    """Return the network with its weights in float32, in eval mode, without gradients."""
    with torch.device("meta"):
        network = EfficientNetLite0()
    weights = {name: weight.float() for name, weight in load_file(WEIGHTS).items()}
    network.load_state_dict(weights, assign=True)
    return network.to(device).eval().requires_grad_(False)
