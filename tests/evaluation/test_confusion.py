from __future__ import annotations

import numpy as np
import pytest

from dreambooth import tiny
from dreambooth.data import dataset_info, images
from dreambooth.evaluation import confusion, features
from dreambooth.evaluation.measures import Features, of_length_one
from dreambooth.evaluation.prompt_list import AskedPrompts


def cloud(centre: list[float], count: int, seed: int, spread: float = 0.3) -> Features:
    generator = np.random.default_rng(seed)
    return of_length_one(np.array(centre) + spread * generator.standard_normal((count, 3)))


def test_drawings_are_counted_at_the_subject_whose_images_come_first() -> None:
    galleries = [cloud([1, 0, 0], 4, 0), cloud([0, 1, 0], 40, 1), cloud([0, 0, 1], 8, 2)]
    drawn = [cloud([1, 0, 0], 50, 3), cloud([0, 1, 0], 50, 4), cloud([1, 0, 0], 50, 5)]
    matrix = confusion.matrix(drawn, galleries)
    assert matrix.shape == (3, 3)
    assert matrix.sum(axis=1) == pytest.approx([1, 1, 1])
    assert matrix[0, 0] > 0.9
    assert matrix[1, 1] > 0.9
    assert matrix[2, 0] > 0.9  # the third is drawn as the first
    assert confusion.collapse_rate(matrix) == pytest.approx(1 / 3, abs=0.05)


def test_many_instance_images_are_no_advantage() -> None:
    """Drawings that are like neither of two equal clouds are read as each equally often."""
    galleries = [cloud([1, 1, 1], 4, 0, 1.0), cloud([1, 1, 1], 200, 1, 1.0)]
    shares = confusion.matrix([cloud([0, 0, 0], 2000, 2, 1.0)] * 2, galleries)[0]
    assert 0.3 < shares[0] < 0.7


def test_a_subject_without_drawings_is_left_out() -> None:
    galleries = [cloud([1, 0, 0], 4, 0), cloud([0, 1, 0], 4, 1)]
    matrix = confusion.matrix([galleries[0], np.empty((0, 1))], galleries)
    assert np.isnan(matrix[1]).all()
    assert confusion.collapse_rate(matrix) == 0


def test_the_pictures_of_the_embedded_world_are_told_apart() -> None:
    """Half of each subject's pictures stand for drawings; two dogs are among the subjects."""
    network = features.of_judge()
    folders = ("dog1_8", "dog2_4", "cat", "chair")
    seen = [
        of_length_one(
            network([images.to_array(images.open_image(path)) for path in info.instance_images])
        )
        for info in (dataset_info.read(tiny.DATA / name) for name in folders)
    ]
    matrix = confusion.matrix([rows[::2] for rows in seen], [rows[1::2] for rows in seen])
    assert matrix == pytest.approx(np.eye(4))


def test_the_shares_of_subjects_come_together() -> None:
    asked = [
        AskedPrompts(subject="a", own_class="dog"),
        AskedPrompts(subject="b", own_class="dog"),
        AskedPrompts(subject="c", own_class="cat"),
    ]
    found = [
        {
            "subject": np.array([1.0, 0]),
            "class_kept": np.array([1.0, 0, 1]),
            "context": "no reader",
        },
        {"subject": np.array([1.0]), "class_kept": np.array([1.0, 1, 0]), "context": np.ones(1)},
        {"subject": np.array([0.0]), "class_kept": np.array([1.0]), "context": np.ones(1)},
    ]
    joined = confusion.together(asked, found)
    assert np.asarray(joined["subject"]).tolist() == [1, 0, 1, 0]
    assert np.asarray(joined["class_kept"]).tolist() == [1, 0, 0, 1]  # a dog must be neither
    assert joined["context"] == "a: no reader"
    assert confusion.together(asked[:1], found[:1]) == found[0]
