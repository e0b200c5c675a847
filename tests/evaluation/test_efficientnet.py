from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from dreambooth.evaluation import efficientnet, features

CPU = torch.device("cpu")
PHOTOS = os.environ.get("DREAMBOOTH_PHOTOS")
# ImageNet's classes from 151 to 268 are breeds of dogs, those from 281 to 285 cats (287 is a lynx).
DOGS, CATS = range(151, 269), range(281, 288)


@pytest.fixture(scope="module")
def network() -> efficientnet.EfficientNetLite0:
    return efficientnet.load(CPU)


def test_every_weight_is_stored_once_in_half_precision_beside_its_licence() -> None:
    with safe_open(efficientnet.WEIGHTS, "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (it has no iterator)
        assert {file.get_slice(name).get_dtype() for name in shapes} == {"F16"}
    with torch.device("meta"):
        wanted = efficientnet.EfficientNetLite0().state_dict()
    assert shapes == {name: tuple(weight.shape) for name, weight in wanted.items()}
    assert "Apache" in (efficientnet.WEIGHTS.parent / "LICENSE").read_text("utf-8")
    assert efficientnet.WEIGHTS.stat().st_size < 10**7


@pytest.mark.parametrize("size", [7, 8, 9, 224])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2), (5, 1), (5, 2)])
def test_convolutions_are_padded_as_tensorflow_pads_them(
    size: int, kernel: int, stride: int
) -> None:
    layer = efficientnet._Convolution(1, 1, kernel, stride)
    torch.nn.init.ones_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    found = layer(torch.ones(1, 1, size, size))[0, 0]
    out = -(-size // stride)
    missing = max(0, (out - 1) * stride + kernel - size)
    starts = [place * stride - missing // 2 for place in range(out)]  # the odd pixel at the end
    inside = torch.tensor([float(min(s + kernel, size) - max(s, 0)) for s in starts])
    assert torch.equal(found, inside[:, None] * inside[None, :])


def test_features_and_logits_are_finite_and_differ(network: efficientnet.EfficientNetLite0) -> None:
    pixels = torch.linspace(-1, 1, 2 * 3 * 224 * 224).reshape(2, 3, 224, 224)
    made, logits = network.features(pixels), network(pixels)
    assert made.shape == (2, efficientnet.WIDTH)
    assert logits.shape == (2, efficientnet.CLASSES)
    assert bool(torch.isfinite(logits).all())
    assert 0 <= float(made.min()) < float(made.max()) <= 6
    assert not torch.equal(made[0], made[1])


@pytest.mark.skipif(PHOTOS is None, reason="DREAMBOOTH_PHOTOS names no folder of photographs")
def test_photographs_of_a_subject_lie_together(network: efficientnet.EfficientNetLite0) -> None:
    assert PHOTOS is not None
    paths = sorted(Path(PHOTOS).glob("*/*.jpg"))
    subjects = np.array([path.parent.name for path in paths])
    assert len(paths) == 16
    pictures = [squared(path) for path in paths]
    rows = features.of_photographs(CPU)(pictures)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = rows @ rows.T
    same = subjects[:, None] == subjects[None, :]
    of_pairs = ~np.eye(len(paths), dtype=bool)
    assert cosines[same & of_pairs].mean() >= 0.65
    assert cosines[~same].mean() <= 0.35
    nearest = np.where(of_pairs, cosines, -1).argmax(axis=1)
    assert (subjects[nearest] == subjects).all()
    for subject, classes in (("cat", CATS), ("dog", DOGS)):
        for picture in (p for p, name in zip(pictures, subjects, strict=True) if name == subject):
            resized = Image.fromarray(picture).resize((224, 224), Image.Resampling.BICUBIC)
            pixels = torch.tensor(np.asarray(resized)).permute(2, 0, 1)[None] / 127.5 - 1
            assert int(network(pixels).argmax()) in classes


def squared(path: Path) -> np.ndarray:
    image = Image.open(path).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.asarray(image.crop((left, top, left + side, top + side)))
