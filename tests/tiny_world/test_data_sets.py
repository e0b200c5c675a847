from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreambooth.data import dataset_info
from dreambooth.tiny import DATA
from tiny_world import data_sets
from tiny_world.world import SUBJECTS


@pytest.mark.parametrize("data_set", data_sets.DATA_SETS, ids=lambda data_set: data_set.folder)
def test_the_shipped_data_sets_are_what_the_world_draws(
    data_set: data_sets.DataSet, tmp_path: Path
) -> None:
    data_sets.write_data_set(data_set, tmp_path)
    shipped = DATA / data_set.folder
    assert {path.name for path in shipped.iterdir()} == {path.name for path in tmp_path.iterdir()}
    info = json.loads((shipped / "dataset_info.json").read_text(encoding="utf-8"))
    assert info["instance_prompt"] == data_set.instance_prompt
    assert info["class_prompt"] == data_set.class_prompt
    pictures = sorted(shipped.glob("*.png"))
    assert len(pictures) == data_set.pictures
    for path in pictures:
        drawn = np.asarray(Image.open(tmp_path / path.name), dtype=np.int16)
        # Blurred edges and line joints may differ slightly between versions of Pillow.
        assert np.abs(np.asarray(Image.open(path), dtype=np.int16) - drawn).mean() < 1.0


def test_a_beach_is_new_to_every_shipped_subject() -> None:
    for data_set in data_sets.DATA_SETS:
        assert {scene.setting for scene in data_set.scenes()} == {"room", "grass"}


def test_prompts_of_the_shipped_data_sets_are_the_published_ones() -> None:
    prompts = {data_set.folder: data_set.instance_prompt for data_set in data_sets.DATA_SETS}
    assert prompts == {
        "cat": "a photo of a riobugger cat",
        "dog1_8": "a photo of a Doppler dog",
        "dog1_16": "a photo of a Doppler dog",
        "dog2_4": "a photo of a zwx dog",
        "chair": "a photo of a vorbit chair",
        "ottoman": "a photo of a drimel ottoman",
    }


def test_a_mask_covers_the_subject_and_not_its_setting(tmp_path: Path) -> None:
    cat = next(each for each in data_sets.DATA_SETS if each.folder == "cat")
    data_sets.write_data_set(cat, tmp_path, masks=True)
    read = dataset_info.read(tmp_path)
    assert len(read.instance_images) == len(read.masks) == cat.pictures
    for picture, path in read.masks.items():
        mask = np.asarray(Image.open(path)) > 0
        pixels = np.asarray(Image.open(picture).convert("RGB"), dtype=np.int16)
        coat = np.abs(pixels - np.array(SUBJECTS["riobugger"].coat)).max(2) < 12
        assert 0.15 < mask.mean() < 0.6
        assert mask[coat].mean() > 0.95
