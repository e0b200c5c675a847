from __future__ import annotations

from pathlib import Path

import pytest

from dreambooth.errors import UserError
from dreambooth.evaluation import prompt_list

CAT = {"instance_prompt": "a photo of a riobugger cat", "class_prompt": "a photo of a cat"}
PAPER = """Classes

subject_name,class
cat,cat

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the snow'.format(unique_token, class_token),
'a cube shaped {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} in the snow'.format(unique_token, class_token),
'a {0} {1} in a chef outfit'.format(unique_token, class_token),
'{0}'.__class__.__mro__,
]
"""


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text(PAPER, "utf-8")
    return path


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        (CAT, ("a riobugger cat in the snow", "a riobugger cat in a chef outfit")),
        (
            {"instance_prompt": "a sks vase", "class_prompt": "a vase"},
            ("a sks vase in the snow", "a cube shaped sks vase"),
        ),
        (
            {"instance_prompt": "photo of white plastic chair", "class_prompt": "photo of chair"},
            ("a white plastic chair in the snow", "a cube shaped white plastic chair"),
        ),
    ],
)
def test_the_papers_lists_are_read_by_a_pattern(
    written: Path, prompts: dict[str, str], expected: tuple[str, ...]
) -> None:
    assert prompt_list.read(written, **prompts) == expected


@pytest.mark.parametrize(
    "prompts",
    [
        {"instance_prompt": "a photo of a riobugger cat", "class_prompt": None},
        {"instance_prompt": "a photo of a cat", "class_prompt": "a photo of a cat"},
        {"instance_prompt": "a riobugger cat sits", "class_prompt": "a cat"},
        {"instance_prompt": "", "class_prompt": ""},
    ],
)
def test_a_name_that_the_prompts_do_not_show_is_said(
    written: Path, prompts: dict[str, str]
) -> None:
    with pytest.raises(UserError, match="places for the subject's name"):
        prompt_list.read(written, **prompts)


def test_other_files_hold_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffa cat on the moon\n\n  'a {0} dog'  \na cat on the moon\n", "utf-8")
    assert prompt_list.read(path, **CAT) == ("a cat on the moon", "'a {0} dog'")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "holds 0 prompts"),
        (b"\n \n", "holds 0 prompts"),
        (b"a\n" * 2_000, "holds 2000 prompts"),
        (b"\xff\xfe", "not text in UTF-8"),
        (b"a" * 10_000, "a prompt of 10000 characters"),
    ],
)
def test_faulty_files_are_one_sentence(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        prompt_list.read(path, **CAT)
    with pytest.raises(UserError, match="cannot be read"):
        prompt_list.read(tmp_path, **CAT)
