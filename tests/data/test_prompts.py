from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreambooth.data import prompts
from dreambooth.errors import DatasetError
from dreambooth.limits import LIMITS


def write(folder: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    (folder / "dataset_info.json").write_bytes(data)
    return folder


def read(folder: Path, prior: bool = False) -> prompts.Prompts:
    return prompts.read(folder, with_prior_preservation=prior, inside="give that one")


def fault(folder: Path, prior: bool = False) -> str:
    with pytest.raises(DatasetError) as caught:
        read(folder, prior)
    message = str(caught.value)
    assert "dataset_info" in message
    assert "\n" not in message
    return message


def test_both_prompts_are_read_and_trimmed(tmp_path: Path) -> None:
    write(tmp_path, '{"instance_prompt": " a photo of a riobugger cat ", "class_prompt": "a cat"}')
    found = read(tmp_path, prior=True)
    assert found.subjects[0].instance_prompt == "a photo of a riobugger cat"
    assert found.subjects[0].class_prompt == "a cat"
    assert found.warnings == ()


def test_the_class_prompt_may_be_left_out_without_prior_preservation(tmp_path: Path) -> None:
    for content in ('{"instance_prompt": "x"}', '{"instance_prompt": "x", "class_prompt": null}'):
        assert read(write(tmp_path, content)).subjects[0].class_prompt is None
        message = fault(tmp_path, prior=True)
        assert "no class_prompt, which with_prior_preservation=True needs" in message
        assert '"class_prompt": "a photo of a cat"' in message


def test_a_byte_order_mark_and_other_alphabets_are_fine(tmp_path: Path) -> None:
    write(tmp_path, b"\xef\xbb\xbf" + '{"instance_prompt": "фото 猫"}'.encode())
    assert read(tmp_path).subjects[0].instance_prompt == "фото 猫"


@pytest.mark.parametrize(
    "content",
    [
        "{'instance_prompt': 'a dog', 'class_prompt': None}",
        '{"instance_prompt": "a dog",}',
        "  {'instance_prompt': \"a dog\"}\n",
    ],
)
def test_python_notation_is_understood_with_a_warning(tmp_path: Path, content: str) -> None:
    found = read(write(tmp_path, content))
    assert found.subjects[0].instance_prompt == "a dog"
    (warning,) = found.warnings
    assert "not JSON but was understood" in warning
    assert "double quotes" in warning


def test_entries_without_a_meaning_are_mentioned(tmp_path: Path) -> None:
    found = read(write(tmp_path, '{"instance_prompt": "x", "steps": 3}'))
    assert found.warnings == ("dataset_info.json has entries that mean nothing here: steps.",)


def test_a_missing_file_shows_what_to_write(tmp_path: Path) -> None:
    message = fault(tmp_path)
    assert "missing" in message
    assert '{"instance_prompt": "a photo of a riobugger cat"}' in message
    assert "class_prompt" not in message
    assert "class_prompt" in fault(tmp_path, prior=True)


def test_a_hidden_suffix_and_a_nested_folder_are_noticed(tmp_path: Path) -> None:
    nested = tmp_path / "photos"
    nested.mkdir()
    write(nested, '{"instance_prompt": "x"}')
    assert "(there is one in its sub-folder photos: give that one?)" in fault(tmp_path)
    (tmp_path / "dataset_info.json.txt").write_text("{}")
    assert "there is dataset_info.json.txt" in fault(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "it is empty"),
        ('{"instance_prompt": "x"', "line 1, column 24"),
        ('{\n "instance_prompt" "x"}', "line 2, column 20"),
        ("{“instance_prompt”: “x”}", "typographic quotes"),
        ("[" * 100_000, "nested too deeply"),
        ("{'a': " + "-" * 60_000 + "1}", "not valid JSON"),
        ("{'a': " * 5_000, "not valid JSON"),
        ("9" * 10_000, "not valid JSON"),
        ('["a"]', "holds a list"),
        ('"a photo"', "holds a text"),
        ("null", "holds null"),
        ("{}", "no instance_prompt:"),
        ('{"prompt": "x"}', "no instance_prompt (it has prompt)"),
        ('{"instance_prompt": ""}', "no instance_prompt"),
        ('{"instance_prompt": "  \\n"}', "no instance_prompt"),
        ('{"instance_prompt": ""}', "no instance_prompt (it is empty): write"),
        (
            '{"instance_prompt": " ", "class_prompt": "x"}',
            "no instance_prompt (it is empty): write",
        ),
        ('{"instance_prompt": null}', "no instance_prompt (it is null): write"),
        ('{"instance_prompt": ["x"]}', "instance_prompt in"),
        ('{"instance_prompt": ["x"]}', "is a list"),
        ('{"instance_prompt": 3}', "is a number"),
        ('{"instance_prompt": true}', "is true or false"),
        ('{"instance_prompt": "x", "class_prompt": {}}', "is an object"),
        ('{"instance_prompt": "\\ud83d"}', "half a character"),
        (json.dumps({"instance_prompt": "x" * 10_001}), "10001 characters"),
        (b"\xff\xfe{\x00", "not UTF-8 (at byte 0)"),
        (b'{"instance_prompt": "caf\xe9"}', "not UTF-8 (at byte 24)"),
    ],
)
def test_every_fault_has_its_sentence(tmp_path: Path, content: str | bytes, words: str) -> None:
    assert words in fault(write(tmp_path, content))


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    write(tmp_path, '{"instance_prompt": "x"}' + " " * 100)
    limits = replace(LIMITS, max_dataset_info_bytes=50)
    with pytest.raises(DatasetError, match="more than 50 bytes"):
        prompts.read(tmp_path, with_prior_preservation=False, inside="", limits=limits)


def test_a_fifo_or_folder_in_its_place_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "dataset_info.json")
    assert "not a regular file" in fault(tmp_path)
    os.unlink(tmp_path / "dataset_info.json")
    (tmp_path / "dataset_info.json").mkdir()
    assert "not a regular file" in fault(tmp_path)


@given(st.binary(max_size=200))
def test_any_bytes_give_prompts_or_a_dataset_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    write(folder, data)
    try:
        outcome = read(folder).subjects[0].instance_prompt
    except DatasetError as error:
        outcome = str(error)
    assert outcome
