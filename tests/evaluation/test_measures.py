from __future__ import annotations

import numpy as np
import pytest

from dreambooth.evaluation import measures

SUBJECT = np.array([[1.0, 0, 0], [0.8, 0.6, 0]])
OTHERS = np.array([[0, 1.0, 0], [0, 0.6, 0.8], [0, 0, 1.0]])


def test_features_get_length_one_and_zero_stays_zero() -> None:
    found = measures.of_length_one(np.array([[3.0, 4.0], [0, 0]]))
    assert np.allclose(found, [[0.6, 0.8], [0, 0]])


def test_the_rank_is_the_average_precision_of_the_subjects_pictures() -> None:
    drawn = measures.of_length_one(np.array([[1.0, 0.1, 0], [0, 0, 1.0], [0.1, 1.0, 0]]))
    found = measures.subject_rank(drawn, SUBJECT, OTHERS)
    assert found[0] == pytest.approx((1 / 1 + 2 / 2) / 2)
    order = np.argsort(-(drawn[2] @ np.concatenate([SUBJECT, OTHERS]).T), kind="stable")
    places = sorted(int(np.flatnonzero(order == number)[0]) + 1 for number in (0, 1))
    assert found[2] == pytest.approx((1 / places[0] + 2 / places[1]) / 2)
    assert found[1] < found[2] < found[0]


@pytest.mark.parametrize("count", [1, 3])
def test_a_rank_is_one_at_best_and_small_at_worst(count: int) -> None:
    subject = np.tile([1.0, 0, 0], (count, 1))
    others = np.tile([0.0, 1, 0], (97, 1))
    best, worst = measures.subject_rank(np.eye(3)[:2], subject, others)
    assert best == pytest.approx(1)
    assert worst < 0.04


def test_likeness_is_the_mean_cosine() -> None:
    assert measures.likeness(SUBJECT[:1], SUBJECT) == pytest.approx([(1 + 0.8) / 2])


def test_a_class_is_kept_where_its_own_picture_is_the_nearest() -> None:
    drawn = measures.of_length_one(np.array([[0.9, 0.2, 0], [0, 0.9, 0.1], [0, 0.2, 0.9]]))
    assert measures.kept(drawn, SUBJECT, OTHERS).tolist() == [0, 1, 1]


def test_variety_is_the_mean_distance_to_the_others() -> None:
    assert measures.variety(np.eye(3)) == pytest.approx([1, 1, 1])
    assert measures.variety(np.tile([[1.0, 0]], (4, 1))) == pytest.approx([0] * 4)
    assert measures.variety(np.array([[1.0, 0], [1, 0], [0, 1]])) == pytest.approx([0.5, 0.5, 1])
    with pytest.raises(ValueError, match="two at least"):
        measures.variety(np.eye(3)[:1])


def test_a_place_fits_better_than_nearly_all_drawings_without_it() -> None:
    plain = np.linspace(0, 1, 101)
    assert measures.better_fit(np.array([0.94, 0.96, 2.0]), plain).tolist() == [0, 1, 1]


def test_the_label_that_is_read_most_often() -> None:
    assert measures.most_often(np.array([3, 1, 1, 2])) == 1


def test_classes_whose_weights_point_in_like_directions_are_akin() -> None:
    generator = np.random.default_rng(0)
    kinds = np.repeat(np.eye(4), 8, axis=0)  # four kinds of eight classes
    weights = kinds + 0.1 * generator.standard_normal(kinds.shape)
    akin = measures.akin_classes(weights)
    assert (akin == akin.T).all()
    assert akin.diagonal().all()
    kind = np.repeat(np.arange(4), 8)
    same = kind[:, None] == kind[None, :]
    assert not akin[~same].any()
    assert akin[same].mean() > 0.9


def test_pictures_are_read_as_classes_akin_to_those_of_the_class() -> None:
    akin = np.kron(np.eye(3), np.ones((2, 2))).astype(bool)  # classes 0 1, 2 3 and 4 5
    drawn = np.array([0, 1, 2, 4])
    found = measures.read_alike(drawn, np.array([0, 1, 1, 0, 0]), akin)
    assert found is not None
    assert found.tolist() == [1, 1, 0, 0]
    mixed = measures.read_alike(drawn, np.array([0, 1, 1, 0, 0, 4]), akin)  # 5 of 6 are known
    assert mixed is not None
    assert mixed.tolist() == [1, 1, 0, 1]
    assert measures.read_alike(drawn, np.array([0, 1, 2, 4]), akin) is None
    assert measures.read_alike(drawn, np.array([0]), akin) is None


def test_an_interval_holds_the_mean_and_shrinks_with_more_drawings() -> None:
    generator = np.random.default_rng(1)
    values = generator.random(400)
    many, few = measures.summarised(values), measures.summarised(values[:16])
    for found, of in ((many, 400), (few, 16)):
        assert found.low < found.mean < found.high
        assert found.of == of
    assert many.high - many.low < (few.high - few.low) / 2
    assert few == measures.summarised(values[:16])
    same = measures.summarised(np.ones(5))
    assert (same.mean, same.low, same.high) == (1, 1, 1)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(2)
    inside = 0
    for _ in range(200):
        found = measures.summarised((generator.random(64) < 0.7).astype(float))
        inside += found.low <= 0.7 <= found.high
    assert 0.88 <= inside / 200 <= 0.99
