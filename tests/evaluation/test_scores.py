from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

from dreambooth.evaluation.scores import frechet_distance


def features(count: int, width: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1.0, (count, width))


def by_the_textbook(first: np.ndarray, second: np.ndarray) -> float:
    covariances = [np.cov(part, rowvar=False) for part in (first, second)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    means = ((first.mean(axis=0) - second.mean(axis=0)) ** 2).sum()
    return float(means + np.trace(covariances[0] + covariances[1] - 2 * np.real(root)))


def test_it_equals_the_textbooks_formula_where_covariances_are_regular() -> None:
    first, second = features(200, 6, seed=0), features(150, 6, seed=1, shift=0.3) * 1.4
    assert frechet_distance(first, second) == pytest.approx(by_the_textbook(first, second))


def test_a_set_is_at_no_distance_from_itself() -> None:
    for count in (3, 300):  # singular and regular covariances
        first = features(count, 20, seed=0)
        assert frechet_distance(first, first[::-1]) == pytest.approx(0, abs=1e-9)


def test_it_is_symmetric_and_grows_with_the_shift() -> None:
    first = features(8, 50, seed=0)
    distances = [frechet_distance(first, first + shift) for shift in (0.1, 1.0, 3.0)]
    assert distances == pytest.approx([50 * shift**2 for shift in (0.1, 1.0, 3.0)])
    second = features(5, 50, seed=1)
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first))


def test_one_picture_has_no_covariance() -> None:
    with pytest.raises(ValueError, match="two pictures"):
        frechet_distance(features(1, 4, seed=0), features(5, 4, seed=1))
