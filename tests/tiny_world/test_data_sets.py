from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreambooth.tiny import DATA
from tiny_world import data_sets


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
