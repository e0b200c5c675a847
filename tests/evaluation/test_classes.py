"""EfficientNet-Lite0's classes say what a class's pictures are read as, without a table of names.

`python -m pytest tests/evaluation/test_classes.py -s` prints the figures of docs/measurements.md.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dreambooth.evaluation import features, measures
from tests.evaluation.test_efficientnet import CATS, DOGS, PHOTOS, squared


@pytest.fixture(scope="module")
def network() -> features.FeatureNetwork:
    return features.of_photographs(torch.device("cpu"))


@pytest.fixture(scope="module")
def akin(network: features.FeatureNetwork) -> np.ndarray:
    return measures.akin_classes(network.heads["class"][0])


def test_breeds_of_dogs_are_akin_to_each_other_and_to_no_cat(akin: np.ndarray) -> None:
    generator = np.random.default_rng(0)
    for breeds, wanted in ((4, 0.6), (16, 0.95)):
        reached = [
            akin[generator.choice(DOGS, breeds, replace=False)].any(axis=0) for _ in range(50)
        ]
        share = float(np.mean([each[list(DOGS)] for each in reached]))
        print(f"{breeds} breeds are akin to {share:.2f} of all")
        assert share >= wanted
        assert not np.any([each[list(CATS)] for each in reached])


@pytest.mark.skipif(PHOTOS is None, reason="DREAMBOOTH_PHOTOS names no folder of photographs")
def test_photographs_are_read_as_the_others_of_their_subject(
    network: features.FeatureNetwork, akin: np.ndarray
) -> None:
    assert PHOTOS is not None
    read = {
        folder.name: features.labels(
            network([squared(path) for path in sorted(folder.glob("*.jpg"))]),
            network.heads["class"],
        )
        for folder in sorted(Path(PHOTOS).iterdir())
        if folder.is_dir()
    }
    for subject, own in read.items():
        for at, label in enumerate(own):
            found = measures.read_alike(label[None], np.delete(own, at), akin)
            assert found is not None
            assert found.tolist() == [1], (subject, at)
        for other in read.keys() - {subject}:
            found = measures.read_alike(read[other], own, akin)
            assert found is not None
            assert not found.any(), (subject, other)
