from __future__ import annotations

import json
from pathlib import Path

import pytest

from dreambooth.limits import LIMITS
from dreambooth.model_folder import taught_subjects
from dreambooth.model_folder.taught_subjects import TaughtSubject


def read(folder: Path, content: object) -> tuple[TaughtSubject, ...]:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "__model_info__.json").write_text(text)
    return taught_subjects.read(folder)


def test_a_model_tells_its_subjects(tmp_path: Path) -> None:
    subjects = [
        {"instance_prompt": "a photo of a zwx dog", "class_prompt": "a photo of a dog"},
        {"instance_prompt": " a photo of a sks cat ", "class_prompt": None},
    ]
    assert read(tmp_path, {"instance_prompt": "x", "subjects": subjects}) == (
        TaughtSubject(instance_prompt="a photo of a zwx dog", class_prompt="a photo of a dog"),
        TaughtSubject(instance_prompt="a photo of a sks cat"),
    )


def test_a_model_of_an_earlier_version_tells_one(tmp_path: Path) -> None:
    found = read(tmp_path, {"instance_prompt": "a sks cat", "class_prompt": "a cat"})
    assert found == (TaughtSubject(instance_prompt="a sks cat", class_prompt="a cat"),)


def test_a_base_model_has_none(tmp_path: Path) -> None:
    assert taught_subjects.read(tmp_path) == ()
    assert read(tmp_path, {"resolution": 512}) == ()


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        {"subjects": "a sks cat"},
        {"subjects": None},
        {"subjects": [3, "x", [], {}, {"instance_prompt": 3}, {"instance_prompt": " "}]},
        {"subjects": [{"instance_prompt": "x" * (LIMITS.max_prompt_characters + 1)}]},
        {"instance_prompt": "\ud800"},
    ],
)
def test_a_strangers_nonsense_is_left_out(tmp_path: Path, content: object) -> None:
    assert read(tmp_path, content) == ()


def test_a_stranger_cannot_give_countless_ones(tmp_path: Path) -> None:
    many = [{"instance_prompt": f"a photo of x{n}", "class_prompt": n} for n in range(1000)]
    found = read(tmp_path, {"subjects": many})
    assert len(found) == LIMITS.max_subjects == 16
    assert {each.class_prompt for each in found} == {None}
