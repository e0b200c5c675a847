from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from dreambooth.data import dataset_info, fingerprint
from dreambooth.data.dataset_info import DatasetInfo
from dreambooth.errors import DatasetError
from dreambooth.limits import LIMITS

PROMPT = "a photo of a riobugger cat"
SOFA = "a photo of a riobugger cat on a red sofa"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b (1).jpg", "c.png"):
        Image.effect_noise((40, 48), 50).save(tmp_path / name)
    prompts = {"instance_prompt": PROMPT, "class_prompt": "a photo of a cat"}
    (tmp_path / "dataset_info.json").write_text(json.dumps(prompts))
    return tmp_path


def line(name: object, text: object, **more: object) -> str:
    return json.dumps({"file_name": name, "text": text, **more}) + "\n"


def listed(folder: Path, *lines: str) -> Path:
    (folder / "captions.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def read(folder: Path) -> DatasetInfo:
    return dataset_info.read(folder)


def fault(folder: Path) -> str:
    with pytest.raises(DatasetError) as caught:
        read(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_caption_overrides_the_instance_prompt_of_its_picture(folder: Path) -> None:
    info = read(listed(folder, line("b (1).jpg", f" {SOFA}\n", width=40), "\n"))
    assert info.prompts == (PROMPT, SOFA, PROMPT)
    assert info.warnings == ()


def test_a_text_beside_a_picture_is_its_caption(folder: Path) -> None:
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbf" + SOFA.replace(" on", "\r\non").encode())
    (folder / "C.TXT").write_text("of no picture")
    listed(folder, line("c.png", "a riobugger cat outside"))
    info = read(folder)
    assert info.prompts == (SOFA, PROMPT, "a riobugger cat outside")
    assert info.warnings == ("Skipped 1 entry (no picture) in the training folder: C.TXT.",)


def test_without_captions_nothing_changes(folder: Path) -> None:
    (subject,) = read(folder).subjects
    assert subject.captions == ()
    assert subject.prompts == (PROMPT,) * 3


def test_line_separators_inside_a_text_end_no_line(folder: Path) -> None:
    entry = json.dumps({"file_name": "a.png", "text": "a riobugger\u2028cat"}, ensure_ascii=False)
    assert read(listed(folder, entry)).prompts[0] == "a riobugger cat"


def test_captions_belong_to_the_fingerprint(folder: Path) -> None:
    found = {fingerprint.of_dataset(read(folder))}
    for text in (SOFA, "a riobugger cat"):
        found.add(fingerprint.of_dataset(read(listed(folder, line("a.png", text)))))
    found.add(fingerprint.of_dataset(read(listed(folder, line("c.png", SOFA)))))
    assert len(found) == 4


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["{"], "Line 1 of .* is not valid JSON"),
        ([line("a.png", SOFA), "[" * 100_000], "Line 2 of .* is not valid JSON"),
        (["3"], "Line 1 of .* has no file_name"),
        ([json.dumps({"filename": "a.png", "text": "x"})], "has no file_name in quotes"),
        ([line(3, "x")], "has no file_name"),
        ([line("a.png", 3)], "text of line 1 in .* is a number"),
        ([line("a.png", None)], "gives no text for 'a.png'"),
        ([line("a.png", " ")], "gives no text for 'a.png'"),
        ([line("a.png", "x" * 4001)], "text of line 1 in .* has 4001 characters"),
        ([line("a.png", "\ud800")], "half a character"),
        ([line("a.jpg", SOFA)], "'a.jpg', which is no picture beside it.* Did you mean a.png?"),
        ([line("../a.png", SOFA)], "'../a.png', which is no picture beside it"),
        ([line("a.png", SOFA)] * 2, "Line 2 of .* gives a second caption of 'a.png'"),
    ],
)
def test_faults_in_the_list_name_the_line(folder: Path, lines: list[str], words: str) -> None:
    assert re.search(words, fault(listed(folder, *lines)))


def test_faults_in_a_text_name_the_file(folder: Path) -> None:
    for content, words in (
        (b" \n", "a.txt is empty"),
        (b"a cat \xff", "a.txt is not UTF-8 (at byte 6)"),
        (b"x" * 4001, "a.txt has 4001 characters"),
        (b"x" * 20_000, "a.txt has more than 16000 bytes"),
    ):
        (folder / "a.txt").write_bytes(content)
        assert words in fault(folder)


def test_two_captions_of_one_picture_are_refused(folder: Path) -> None:
    (folder / "a.txt").write_text(SOFA)
    assert "a.txt and captions.jsonl both give a caption of a.png" in fault(
        listed(folder, line("a.png", SOFA))
    )


def test_a_list_that_is_no_file_is_refused(folder: Path) -> None:
    os.mkfifo(folder / "captions.jsonl")
    assert "captions.jsonl is not a regular file" in fault(folder)
    (folder / "captions.jsonl").unlink()
    (folder / "captions.jsonl").write_bytes(b"\xff\xfe")
    assert "captions.jsonl is not UTF-8" in fault(folder)


def test_caps_on_captions(folder: Path) -> None:
    listed(folder, *(line(name, f"riobugger {name}") for name in ("a.png", "b (1).jpg")))
    with pytest.raises(DatasetError, match="2 different captions, more than the 1 allowed"):
        dataset_info.read(folder, limits=replace(LIMITS, max_captions=1))
    with pytest.raises(DatasetError, match="has more than 10 bytes"):
        dataset_info.read(folder, limits=replace(LIMITS, max_captions_bytes=10))
    listed(folder, *(line(name, SOFA) for name in ("a.png", "b (1).jpg")))
    assert dataset_info.read(folder, limits=replace(LIMITS, max_captions=1)).prompts.count(SOFA)


def test_the_caption_of_a_damaged_picture_is_no_fault(folder: Path) -> None:
    (folder / "b (1).jpg").write_bytes(b"\xff\xd8\xff broken")
    info = read(listed(folder, line("b (1).jpg", SOFA)))
    assert info.prompts == (PROMPT, PROMPT)
    (warning,) = info.warnings
    assert "b (1).jpg" in warning


def test_a_caption_without_the_subjects_name_is_warned_of(folder: Path) -> None:
    texts = ("A Riobugger, outside.", "a photo of a cat on a sofa", "a photo")
    names = ("a.png", "b (1).jpg", "c.png")
    info = read(listed(folder, *map(line, names, texts)))
    assert info.warnings == (
        "2 captions of b (1).jpg, c.png do not name the subject (riobugger): such a picture "
        "teaches its look under another name.",
    )
    (folder / "dataset_info.json").write_text(json.dumps({"instance_prompt": "a photo of sks cat"}))
    listed(folder, line("a.png", "my cat"), line("c.png", "a photo of a dog"))
    (warning,) = read(folder).warnings  # without a class prompt all but common words name it
    assert warning.startswith("The caption of c.png does not name the subject (sks cat)")


def test_captions_of_several_subjects_lie_in_their_folders(folder: Path) -> None:
    subjects = []
    for name in ("a", "c"):
        (folder / name).mkdir()
        (folder / f"{name}.png").rename(folder / name / "0.png")
        (folder / name / "0.txt").write_text(f"a {name}s cat outside")
        subjects.append({"folder": name, "instance_prompt": f"a photo of {name}s cat"})
    (folder / "b (1).jpg").unlink()
    (folder / "dataset_info.json").write_text(json.dumps({"subjects": subjects}))
    assert read(folder).prompts == ("a as cat outside", "a cs cat outside")
    listed(folder, line("0.png", SOFA))
    assert "captions.jsonl lies beside the folders of the subjects (a, c)" in fault(folder)
