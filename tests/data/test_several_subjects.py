"""A training folder with several subjects: its list, its sub-folders and every fault in them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from dreambooth.data import dataset_info, fingerprint
from dreambooth.data.dataset_info import DatasetInfo
from dreambooth.errors import DatasetError
from dreambooth.limits import LIMITS

DOG1 = {
    "folder": "dog1",
    "instance_prompt": "a photo of a Doppler dog",
    "class_prompt": "a photo of a dog",
}
DOG2 = {**DOG1, "folder": "dog2", "instance_prompt": "a photo of a zwx dog"}
CAT = {
    "folder": "cat",
    "instance_prompt": "a photo of a sks cat",
    "class_prompt": "a photo of a cat",
}
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Return a function that writes a training folder with these entries and pictures."""

    def write(*entries: object, pictures: dict[str, int] | None = None, **others: object) -> Path:
        counts = {"dog1": 3, "dog2": 2} if pictures is None else pictures
        for name, count in counts.items():
            (tmp_path / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                Image.effect_noise((40, 48), 50).save(tmp_path / name / f"{number}.png")
        info = {"subjects": list(entries or (DOG1, DOG2)), **others}
        (tmp_path / "dataset_info.json").write_text(json.dumps(info))
        return tmp_path

    return write


def read(folder: Path, prior: bool = True) -> DatasetInfo:
    return dataset_info.read(folder, with_prior_preservation=prior)


def fault(folder: Path, prior: bool = True) -> str:
    with pytest.raises(DatasetError) as caught:
        read(folder, prior)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_each_subject_has_its_pictures_and_prompts(make: Make) -> None:
    info = read(make())
    assert [each.name for each in info.subjects] == ["dog1", "dog2"]
    assert [each.instance_prompt for each in info.subjects] == [
        "a photo of a Doppler dog",
        "a photo of a zwx dog",
    ]
    assert [len(each.instance_images) for each in info.subjects] == [3, 2]
    assert [path.parent.name for path in info.instance_images] == ["dog1"] * 3 + ["dog2"] * 2
    assert info.prompts == (DOG1["instance_prompt"],) * 3 + (DOG2["instance_prompt"],) * 2
    assert [each.class_prompt for each in info.class_sets] == ["a photo of a dog"]
    assert info.warnings == ()
    assert set(info.sha256) == set(info.instance_images)


def test_class_images_belong_to_their_class_prompt(make: Make) -> None:
    entries = (
        {**DOG1, "class_data_dir": "dog1/class"},
        {**CAT, "class_data_dir": "classes/cats"},
        {**DOG2, "class_data_dir": "classes/dogs"},
    )
    counts = {"dog1": 2, "dog2": 1, "cat": 1, "dog1/class": 2, "classes/cats": 3, "classes/dogs": 1}
    info = read(make(*entries, pictures=counts))
    assert [(each.class_prompt, len(each.images)) for each in info.class_sets] == [
        ("a photo of a dog", 3),
        ("a photo of a cat", 3),
    ]
    assert info.warnings == ()
    assert read(make(*entries, pictures={}), prior=False).class_images == ()


def test_a_class_folder_of_two_subjects_counts_once_and_may_be_missing(make: Make) -> None:
    entries = [{**one, "class_data_dir": "dogs"} for one in (DOG1, DOG2)]
    assert read(make(*entries)).class_images == ()
    folder = make(*entries, pictures={"dogs": 4})
    assert len(read(folder).class_images) == 4
    (folder / "dogs" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert len(read(folder).warnings) == 1


def test_one_subject_in_a_list_is_that_subject(make: Make) -> None:
    info = read(make(DOG1))
    assert not info.are_several
    assert len(info.instance_images) == 3


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (["dog1"], "Subject 1 .* is a text: it must be an object"),
        ([{**DOG1, "foldr": "x"}], "'dog1'.* has an entry 'foldr', did you mean folder"),
        ([{**DOG1, "steps": 3}], "'dog1'.* has an entry 'steps'. A subject may have folder, inst"),
        ([{"instance_prompt": "x"}], "There is no folder of subject 1"),
        ([{**DOG1, "folder": 3}], "folder of subject 1 .* is a number"),
        ([{**DOG1, "class_data_dir": ["x"]}], "class_data_dir of the subject 'dog1' .* is a list"),
        ([{"folder": "dog1", "class_prompt": "x"}], "'dog1'.* gives no instance_prompt"),
        ([{**DOG1, "instance_prompt": 3}], "instance_prompt of the subject 'dog1' .* is a number"),
        ([{"folder": "dog1", "instance_prompt": "x"}], "'dog1'.* gives no class_prompt"),
        ([DOG1, {**DOG2, "instance_prompt": "A photo of  a doppler DOG"}], "dog1 and dog2 .* same"),
        ([DOG1, {**DOG2, "folder": "dog1"}], "dog1 and dog1 .* overlap"),
        ([DOG1, {**DOG2, "folder": "dog1/two"}], "dog1 and dog1/two .* overlap"),
        ([{**DOG1, "folder": "dogs/one"}, {**DOG2, "folder": "dogs"}], "dogs/one and dogs .* over"),
        ([DOG1, {**DOG2, "class_data_dir": "dog1"}], "dog2 .* is the folder of the subject dog1"),
        (
            [{**DOG1, "class_data_dir": "c"}, {**CAT, "class_data_dir": "c"}],
            "dog1 and cat .* same class_data_dir and different class_prompts",
        ),
        (
            [{**CAT, "folder": "Lion", "instance_prompt": 1}],
            "instance_prompt of the subject 'Lion'",
        ),
        ([{**CAT, "folder": "lion"}], "folder of the subject lion, .* is not there"),
        ([{**CAT, "folder": "l" * 5_000}], "folder of the subject lll.* is not there"),
    ],
)
def test_faults_in_the_list_name_the_subject(make: Make, entries: list[object], words: str) -> None:
    assert re.search(words, fault(make(*entries)))


@pytest.mark.parametrize(
    "name", ["..", "../x", "dog1/../..", "/etc", "a//b", ".", "./dog1", "", "a\\b", "a\nb", "a\0b"]
)
@pytest.mark.parametrize("key", ["folder", "class_data_dir"])
def test_names_stay_inside_the_training_folder(make: Make, name: str, key: str) -> None:
    assert "must be the name of a folder inside the training folder" in fault(
        make({**DOG1, key: name})
    )


@pytest.mark.parametrize("value", [[], {}, "dog1", None, 3])
def test_the_list_must_be_one(make: Make, value: object) -> None:
    folder = make()
    (folder / "dataset_info.json").write_text(json.dumps({"subjects": value}))
    assert "must be a list with an object for each subject" in fault(folder)


def test_a_misspelt_list_is_recognised(make: Make) -> None:
    folder = make()
    (folder / "dataset_info.json").write_text(json.dumps({"subject": [DOG1]}))
    assert "it has subject; did you mean subjects?" in fault(folder)


def test_prompts_stand_in_the_entries_alone(make: Make) -> None:
    message = fault(make(DOG1, instance_prompt="a photo"))
    assert "gives instance_prompt beside subjects" in message


def test_the_number_of_subjects_is_capped(make: Make) -> None:
    entries = [
        {**DOG1, "folder": f"dog{n}", "instance_prompt": f"a photo of x{n}"}
        for n in range(LIMITS.max_subjects + 1)
    ]
    assert "lists 17 subjects, more than the 16 allowed" in fault(make(*entries))


def test_links_are_not_followed(make: Make, tmp_path: Path) -> None:
    folder = make(pictures={"dog1": 1, "elsewhere/dog2": 1})
    os.symlink(folder / "elsewhere" / "dog2", folder / "dog2")
    assert "of the subject dog2 leads over a link" in fault(folder)
    (folder / "dog2").unlink()
    (folder / "dog2").write_text("no folder")
    assert "folder of the subject dog2, " in (message := fault(folder))
    assert "is not a folder" in message
    folder = make(DOG1, {**DOG2, "folder": "dog3", "class_data_dir": "link"}, pictures={"dog3": 1})
    os.symlink(folder / "elsewhere", folder / "link")
    assert "class_data_dir of the subject dog3 leads over a link" in fault(folder)
    assert read(folder, prior=False).are_several  # it is not read there


def test_a_folder_without_a_picture_names_its_subject(make: Make) -> None:
    message = fault(make(pictures={"dog1": 1, "dog2": 0}))
    assert "The folder of the subject dog2 " in message
    assert "holds no picture to train on" in message


def test_a_picture_beside_the_folders_belongs_to_nobody(make: Make) -> None:
    folder = make()
    Image.effect_noise((40, 48), 50).save(folder / "stray.png")
    message = fault(folder)
    assert message.startswith("stray.png in ")
    assert "lies beside the folders of the subjects (dog1, dog2)" in message


def test_what_else_lies_there_is_mentioned(make: Make) -> None:
    folder = make(pictures={"dog1": 1, "dog2": 1, "cat": 1})
    (folder / "dog1" / "notes").write_text("no picture")
    assert read(folder).warnings == (
        "Skipped 1 entry (no picture) in the training folder: cat/.",
        "Skipped 1 entry (no picture) in the folder of the subject dog1: notes.",
    )


def test_the_cap_on_pictures_counts_all_subjects(make: Make) -> None:
    limits = replace(LIMITS, max_instance_images=4)
    with pytest.raises(DatasetError, match="more than the 1 allowed"):
        dataset_info.read(make(), limits=limits)


def test_small_pictures_are_named_with_their_subject(make: Make) -> None:
    sentences = dataset_info.size_warnings(read(make()), 512)
    assert any(each.startswith("dog2/0.png ") for each in sentences)


def test_the_fingerprint_knows_whose_picture_each_is(make: Make) -> None:
    folder = make()
    found = {fingerprint.of_dataset(read(folder))}
    (folder / "dog1" / "2.png").rename(folder / "dog2" / "2.png")
    found.add(fingerprint.of_dataset(read(folder)))
    found.add(fingerprint.of_dataset(read(make(DOG2, DOG1, pictures={}))))
    found.add(fingerprint.of_dataset(read(make(DOG1, {**DOG2, "class_prompt": "x"}, pictures={}))))
    assert len(found) == 4
