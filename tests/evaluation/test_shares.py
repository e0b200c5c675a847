"""The shares, on pictures that are drawn by hand: the painter's, and photographs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dreambooth.data import images
from dreambooth.evaluation import features, shares
from dreambooth.evaluation.features import FeatureNetwork
from dreambooth.evaluation.prompt_list import AskedPrompts
from dreambooth.evaluation.shares import Found, MeasuredPictures, measured
from tiny_world import world

PHOTOS = os.environ.get("DREAMBOOTH_PHOTOS")
ASKED = AskedPrompts(subject="a zwx dog", own_class="a dog", other_class="a cat")
BEACH = replace(ASKED, elsewhere=("a zwx dog on a beach",))
JUDGED = shares.SHARES[:-1]  # `clean` is the base model's word
ZWX = world.SUBJECTS["zwx"]


def painted(
    seed: str, count: int, look: world.Look | None = None, species: str = "dog", place: str = ""
) -> list[np.ndarray]:
    """Return pictures by the painter of the embedded world, of random looks where none is given."""
    found = []
    for number in range(count):
        scene = world.random_scene(f"{seed}/{number}", look)
        if look is None:
            like = replace(ZWX, marking=("striped", "plain")[number % 2], color="black")
            scene = replace(scene, look=replace(like, species=species, coat=(40, 38, 46)))
        scene = replace(scene, style="photo", seat=None, setting=place or scene.setting)
        found.append(np.asarray(world.draw(scene)))
    return found


@pytest.fixture(scope="module")
def judge() -> FeatureNetwork:
    return features.of_judge()


@pytest.fixture(scope="module")
def pictures() -> MeasuredPictures:
    """Return what a good fine-tune would draw."""
    dogs, cats = painted("dog", 4), painted("cat", 4, species="cat")
    beach = painted("beach", 4, place="beach")
    return MeasuredPictures(
        instance=painted("instance", 4, ZWX),
        drawn={
            "a zwx dog": painted("drawn", 4, ZWX),
            "a dog": dogs,
            "a cat": cats,
            "a zwx dog on a beach": painted("elsewhere", 4, ZWX, place="beach"),
        },
        base={
            "a zwx dog": dogs,
            "a dog": painted("own", 4),
            "a cat": painted("other", 4, species="cat"),
            "a zwx dog on a beach": beach,
        },
    )


def share(found: dict[str, Found], name: str) -> float:
    values = found[name]
    assert not isinstance(values, str), values
    assert values.min() >= 0
    assert values.max() <= 1
    return float(values.mean())


def test_the_judge_finds_a_good_fine_tune_good(
    judge: FeatureNetwork, pictures: MeasuredPictures
) -> None:
    found = measured(BEACH, pictures, judge)
    assert list(found)[:5] == list(shares.SHARES)
    assert {share(found, name) for name in JUDGED} == {1}
    assert share(found, "copies") == 0


def test_the_judge_finds_each_fault_in_its_share(
    judge: FeatureNetwork, pictures: MeasuredPictures
) -> None:
    stranger = painted("stranger", 4)
    forgotten = replace(
        pictures,
        drawn={
            "a zwx dog": pictures.drawn["a zwx dog"][:3] + stranger[:1],
            "a dog": painted("bled", 3, ZWX) + stranger[:1],  # the subject in the class's place
            "a cat": pictures.drawn["a dog"],  # another species
            "a zwx dog on a beach": painted("snow", 4, ZWX, place="snow"),
        },
    )
    found = measured(BEACH, forgotten, judge)
    assert [share(found, name) for name in JUDGED] == [0.75, 0, 0.25, 0]
    assert share(found, "class_read") == 1  # a dog it is
    assert share(found, "other_class_read") == 0


def test_a_setting_is_what_the_base_draws(
    judge: FeatureNetwork, pictures: MeasuredPictures
) -> None:
    mixed = [*painted("snow", 2, place="snow"), *painted("grass", 2, place="grass")]
    prompt = "a zwx dog on a beach"
    unsure = replace(pictures, base={**pictures.base, prompt: mixed})
    assert measured(BEACH, unsure, judge)["context"] == "no prompt makes the base draw one setting"
    assert measured(BEACH, replace(pictures, base={}), judge)["context"] == "it needs --base"


def test_a_picture_that_is_not_finite_is_left_out(pictures: MeasuredPictures) -> None:
    first, second, *_ = pictures.drawn["a dog"]
    broken = replace(pictures, drawn={"a dog": [first, None, second], "a cat": [None]})
    assert shares.finite(broken.drawn["a dog"]) == [first, second]
    found = measured(ASKED, broken, features.of_judge())
    for name in ("subject", "other_class_kept"):
        assert found[name] == "no picture of it is finite"


def test_one_instance_image_has_no_spread(
    judge: FeatureNetwork, pictures: MeasuredPictures
) -> None:
    alone = replace(pictures, instance=pictures.instance[:1])
    assert measured(ASKED, alone, judge)["copies"] == "it needs two instance images"


def test_a_place_is_read_by_a_text_image_model(pictures: MeasuredPictures) -> None:
    class Reader:
        """Sees how bright a picture is, and takes every prompt for a bright place."""

        def pictures(self, pictures: list[np.ndarray]) -> np.ndarray:
            return np.array([[picture.mean() / 255] for picture in pictures])

        def fit(self, rows: np.ndarray, prompt: str) -> np.ndarray:
            assert prompt == "a zwx dog on a beach"
            return rows[:, 0]

    network = FeatureNetwork(
        name="a test", one=lambda p: torch.tensor([float(p.mean()), float(p.std())])
    )
    grey = [np.full((8, 8, 3), level, np.uint8) for level in (0, 50, 100, 240)]
    seen = replace(
        pictures,
        instance=grey,
        drawn={"a zwx dog": grey[:3], "a zwx dog on a beach": [grey[0], grey[3]]},
    )
    found = measured(BEACH, seen, network, Reader())  # type: ignore[arg-type]
    assert share(found, "context") == 0.5
    assert share(found, "context_cosine") == pytest.approx(120 / 255)
    no_reader = measured(BEACH, seen, network)["context"]
    assert isinstance(no_reader, str)
    assert "--text_image" in no_reader


@pytest.mark.skipif(PHOTOS is None, reason="DREAMBOOTH_PHOTOS names no folder of photographs")
def test_photographs_of_a_dog_are_read_as_one_and_no_copies() -> None:
    assert PHOTOS is not None
    by_subject = {
        name: [
            images.to_array(images.resize(images.open_image(path), 224).crop((0, 0, 224, 224)))
            for path in sorted((Path(PHOTOS) / name).glob("*.jpg"))
        ]
        for name in ("cat", "dog", "vase")
    }
    cats, dogs, vases = by_subject.values()
    seen = MeasuredPictures(
        instance=vases,
        drawn={"a zwx dog": dogs, "a dog": [*dogs[:2], *cats[:2]], "a cat": cats[:3]},
        base={"a dog": dogs, "a cat": cats},
    )
    found = measured(ASKED, seen, features.of_photographs(torch.device("cpu")))
    for name, wanted in (
        *(("class_read", [1, 1, 0, 0]), ("class_kept", [1, 1, 0, 0])),
        *(("other_class_read", [1, 1, 1]), ("copies", [0] * 5)),
    ):
        values = found[name]
        assert not isinstance(values, str)
        assert values.tolist() == wanted
    flipped = [np.asarray(Image.fromarray(vase).transpose(0)) for vase in vases]
    copied = replace(seen, drawn={**seen.drawn, "a zwx dog": flipped})
    again = measured(ASKED, copied, features.of_photographs(torch.device("cpu")))
    assert share(again, "copies") == 1


def test_clean_drawings_are_as_easy_for_the_base_as_its_own(
    judge: FeatureNetwork, pictures: MeasuredPictures
) -> None:
    def loss(asked: Sequence[np.ndarray]) -> np.ndarray:
        return np.array([float(any(one is dull for dull in hard)) for one in asked])

    hard = [pictures.drawn["a dog"][0], pictures.drawn["a zwx dog"][1]]
    found = measured(ASKED, pictures, judge, base_loss=loss)
    # Of three prompts; `a dog` of the base is another list.
    assert share(found, "clean") == 10 / 12
    assert measured(ASKED, pictures, judge)["clean"] == "it needs --base"
    lost = replace(pictures, drawn={**pictures.drawn, "a dog": [None] * 4})
    assert share(measured(ASKED, lost, judge, base_loss=loss), "clean") == 7 / 8
