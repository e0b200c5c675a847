"""Masks: finding, reading, and what they weigh."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dreambooth.data import cache, dataset_info, fingerprint, masks
from dreambooth.errors import DatasetError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "dataset_info.json").write_text(json.dumps({"instance_prompt": "a photo of a cat"}))
    for name in ("one.jpg", "two.png"):
        Image.new("RGB", (40, 30), "red").save(tmp_path / name)
    return tmp_path


def draw_mask(path: Path, size: tuple[int, int] = (40, 30), white: int = 20) -> None:
    mask = Image.new("L", size, 0)
    mask.paste(255, (0, 0, white, size[1]))
    mask.save(path)


def test_a_mask_is_found_beside_its_picture_and_is_no_picture(folder: Path) -> None:
    before = fingerprint.of_dataset(dataset_info.read(folder))
    draw_mask(folder / "two.mask.png")
    Image.new("RGB", (40, 30), "blue").save(folder / "other.mask.png")  # of no picture there
    found = dataset_info.read(folder)
    assert [path.name for path in found.instance_images] == ["one.jpg", "other.mask.png", "two.png"]
    assert found.masks == {folder / "two.png": folder / "two.mask.png"}
    (folder / "other.mask.png").unlink()
    assert fingerprint.of_dataset(dataset_info.read(folder)) != before


def test_a_mask_of_another_size_is_one_sentence(folder: Path) -> None:
    draw_mask(folder / "two.mask.png", (30, 40))
    with pytest.raises(DatasetError, match=r"two\.mask\.png is 30 x 40 pixels and its pi"):
        dataset_info.check_masks(dataset_info.read(folder))


def test_a_mask_that_hides_everything_is_one_sentence(folder: Path) -> None:
    draw_mask(folder / "two.mask.png", white=0)
    with pytest.raises(DatasetError, match=r"two\.mask\.png hides all of the picture"):
        masks.read(folder / "two.png", folder / "two.mask.png", size=(40, 30))


def test_transparency_is_a_mask_and_a_file_beside_it_counts_first(folder: Path) -> None:
    assert masks.read(folder / "one.jpg", None, size=(40, 30)) is None
    picture = Image.new("RGBA", (40, 30), (255, 0, 0, 255))
    picture.paste((0, 0, 0, 0), (0, 0, 10, 30))
    picture.save(folder / "two.png")
    found = masks.read(folder / "two.png", None, size=(40, 30))
    assert found is not None
    assert (found.getpixel((5, 5)), found.getpixel((15, 5))) == (0, 255)
    draw_mask(folder / "two.mask.png")
    found = masks.read(folder / "two.png", folder / "two.mask.png", size=(40, 30))
    assert found is not None
    assert (found.getpixel((5, 5)), found.getpixel((25, 5))) == (255, 0)


def test_a_cell_weighs_as_the_whitest_of_its_pixels_and_all_together_one() -> None:
    pixels = np.zeros((8, 8), dtype=np.uint8)
    pixels[0, 0], pixels[7, 7] = 255, 51
    weights = cache.cell_weights(Image.fromarray(pixels), (2, 2))
    assert torch.allclose(weights, torch.tensor([[[1.0, 0.0], [0.0, 0.2]]]) / 0.3)
    assert weights.mean() == pytest.approx(1)
    for mask in (None, Image.new("L", (8, 8), 0)):
        assert torch.equal(cache.cell_weights(mask, (2, 2)), torch.ones(1, 2, 2))


def test_the_cache_crops_the_mask_as_it_crops_the_picture(folder: Path) -> None:
    def encode(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = torch.nn.functional.avg_pool2d(pixels, 4).mean(1, keepdim=True).repeat(1, 4, 1, 1)
        return mean, torch.zeros_like(mean)

    picture = Image.new("RGB", (60, 30), "black")
    picture.paste((255, 255, 255), (0, 0, 30, 30))  # white where the mask is
    picture.save(folder / "two.png")
    draw_mask(folder / "two.mask.png", (60, 30), white=30)
    built = cache.build(
        [folder / "two.png"],
        resolution=32,
        center_crop=False,
        crops_per_picture=4,
        seed=1,
        stream="instance",
        encode_image=encode,
        mask_of=lambda path, size: masks.read(path, folder / "two.mask.png", size=size),
    )
    assert built.weights is not None
    assert built.weights.shape == (4, 1, 8, 8)
    shows_white = built.mean[:, :1] > -0.9
    assert torch.equal(built.weights > 0, shows_white)
