"""Copies of instance images are found, and other pictures of the subject are none.

`python -m pytest tests/evaluation/test_copies.py -s` prints the rates of docs/measurements.md.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from dreambooth import tiny
from dreambooth.data import images
from dreambooth.evaluation import measures
from tests.evaluation.test_efficientnet import PHOTOS, squared
from tiny_world import world
from tiny_world.data_sets import DATA_SETS, DataSet


def encoded(picture: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def cropped(picture: Image.Image) -> Image.Image:
    edge = round(picture.width * 0.05)
    box = (edge, edge, picture.width - edge, picture.height - edge)
    return picture.crop(box).resize(picture.size, Image.Resampling.BICUBIC)


def brighter(picture: Image.Image) -> Image.Image:
    return ImageEnhance.Brightness(picture).enhance(1.1)


ALTERED: Mapping[str, Callable[[Image.Image], Image.Image]] = {
    "encoded again, quality 85": lambda picture: encoded(picture, 85),
    "encoded again, quality 50": lambda picture: encoded(picture, 50),
    "mirrored": ImageOps.mirror,
    "its middle 90 %": cropped,
    "10 % brighter": brighter,
    "mirrored middle, brighter": lambda picture: brighter(cropped(ImageOps.mirror(picture))),
}


def rates(instance: list[np.ndarray]) -> dict[str, float]:
    """Return the share of copies that is found, by how they are altered."""
    return {
        name: float(
            measures.copied(
                [np.asarray(alter(Image.fromarray(one))) for one in instance], instance
            ).mean()
        )
        for name, alter in ALTERED.items()
    }


def painted(subject: str, seed: str, count: int) -> list[np.ndarray]:
    scenes = [
        world.random_scene(f"copies/{seed}/{number}", world.SUBJECTS[subject])
        for number in range(count)
    ]
    return [np.asarray(world.draw(replace(scene, style="photo"))) for scene in scenes]


@pytest.mark.parametrize("data_set", DATA_SETS, ids=lambda one: one.folder)
def test_in_the_embedded_world(data_set: DataSet) -> None:
    folder, subject = data_set.folder, data_set.subject
    shipped = [
        images.to_array(images.open_image(p)) for p in sorted((tiny.DATA / folder).glob("*.png"))
    ]
    others = painted(subject, "others", 60)
    for name, instance in (("shipped", shipped), ("random", painted(subject, "instance", 6))):
        hits, wrong = rates(instance), float(measures.copied(others, instance).mean())
        print(folder, name, len(instance), "wrong", round(wrong, 3), hits)
        assert set(hits.values()) == {1}
        assert wrong <= 0.02


@pytest.mark.skipif(PHOTOS is None, reason="DREAMBOOTH_PHOTOS names no folder of photographs")
@pytest.mark.parametrize("subject", ["cat", "dog", "vase"])
def test_in_photographs(subject: str) -> None:
    assert PHOTOS is not None
    given = [
        np.asarray(Image.fromarray(squared(path)).resize((512, 512)))
        for path in sorted((Path(PHOTOS) / subject).glob("*.jpg"))
    ]
    hits = rates(given)
    left_out = [
        float(measures.copied([one], [*given[:at], *given[at + 1 :]])[0])
        for at, one in enumerate(given)
    ]
    print(subject, len(given), "wrong", left_out, hits)
    assert set(hits.values()) == {1}
    assert sum(left_out) == 0


def test_one_instance_image_has_no_spread() -> None:
    with pytest.raises(ValueError, match="two at least"):
        measures.copied(painted("zwx", "others", 1), painted("zwx", "instance", 1))
