from __future__ import annotations

import json
import os
import struct
import zlib
from contextlib import AbstractContextManager
from dataclasses import replace
from io import BufferedReader
from pathlib import Path

import pytest
from PIL import Image

from dreambooth.data import dataset_info, fingerprint, images, picture_files
from dreambooth.data.images import ImageFacts
from dreambooth.errors import DatasetError
from dreambooth.limits import LIMITS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "training"
    folder.mkdir()
    prompts = {"instance_prompt": "a photo of a riobugger cat", "class_prompt": "a photo of a cat"}
    (folder / "dataset_info.json").write_text(json.dumps(prompts))
    for number in range(3):
        picture(folder / f"{number}.jpg")
    return folder


def picture(path: Path, size: tuple[int, int] = (80, 60)) -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.effect_noise(size, 50).save(path)
    return path


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        os.path.join(root, name): (found.st_mtime_ns, found.st_size)
        for root, folders, files in os.walk(folder)
        for name in [".", *folders, *files]
        if (found := os.stat(os.path.join(root, name)))
    }


def test_a_plain_folder(folder: Path) -> None:
    info = dataset_info.read(folder)
    assert info.instance_prompt == "a photo of a riobugger cat"
    assert info.class_prompt == "a photo of a cat"
    assert info.instance_images == tuple(folder / f"{number}.jpg" for number in range(3))
    assert info.instance_facts == (ImageFacts(width=80, height=60),) * 3
    assert info.class_images == ()
    assert info.warnings == ()


def test_every_file_is_opened_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "notes.txt").write_text("no picture")
    opened: list[Path] = []

    def open_once(path: Path, **options: object) -> AbstractContextManager[BufferedReader]:
        opened.append(path)
        return picture_files.opened(path, **options)

    monkeypatch.setattr(images, "opened", open_once)
    fingerprint.of_dataset(dataset_info.read(folder))
    assert sorted(opened) == [
        *(folder / f"{number}.jpg" for number in range(3)),
        folder / "notes.txt",
    ]


def test_class_images_are_read_with_prior_preservation_only(folder: Path) -> None:
    expected = tuple(picture(folder / "class_data_dir" / f"{n}.png") for n in range(2))
    assert dataset_info.read(folder).class_images == ()
    assert dataset_info.read(folder).warnings == ()
    info = dataset_info.read(folder, with_prior_preservation=True)
    assert info.class_images == expected
    assert info.warnings == ()
    info = dataset_info.read(folder, with_prior_preservation=True, needs_class_images=False)
    assert info.class_images == ()


def test_class_data_dir_may_have_another_name_or_place(folder: Path, tmp_path: Path) -> None:
    inside = picture(folder / "cats" / "0.png")
    outside = picture(tmp_path / "elsewhere" / "0.png")
    for name, path in (("cats", inside), (str(outside.parent), outside), ("../elsewhere", outside)):
        info = dataset_info.read(folder, class_data_dir=name, with_prior_preservation=True)
        assert [path.samefile(found) for found in info.class_images] == [True]
        # Where it is not the class folder, cats/ is skipped with a warning.
        assert len(info.warnings) == (0 if name == "cats" else 1)


def test_a_missing_or_junk_filled_class_folder_is_no_fault(folder: Path) -> None:
    assert dataset_info.read(folder, with_prior_preservation=True).class_images == ()
    (folder / "class_data_dir").mkdir()
    (folder / "class_data_dir" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    info = dataset_info.read(folder, with_prior_preservation=True)
    assert info.class_images == ()
    (warning,) = info.warnings
    assert "bad.png" in warning
    assert "class_data_dir" in warning


@pytest.mark.parametrize("name", ["0.jpg", ".", "../training"])
def test_a_class_data_dir_that_cannot_be_one(folder: Path, name: str) -> None:
    with pytest.raises(DatasetError, match="class_data_dir points at"):
        dataset_info.read(folder, class_data_dir=name, with_prior_preservation=True)


def test_a_picture_named_as_class_data_dir_stays_an_instance_image(folder: Path) -> None:
    info = dataset_info.read(folder, class_data_dir="0.jpg")
    assert [path.name for path in info.instance_images] == ["0.jpg", "1.jpg", "2.jpg"]


def test_a_large_png_with_a_broken_stream_is_named_and_skipped(folder: Path) -> None:
    broken_png(folder / "broken.png")
    info = dataset_info.read(folder)
    assert len(info.instance_images) == 3
    (warning,) = info.warnings
    assert "broken.png (is damaged" in warning
    for number in range(3):
        (folder / f"{number}.jpg").unlink()
    with pytest.raises(DatasetError, match=r"holds no picture to train on.*broken\.png"):
        dataset_info.read(folder)


def broken_png(path: Path) -> None:
    """Write a PNG of 3 megapixels with valid checksums whose compressed data end in garbage."""
    rows = zlib.compress(bytes(2001 * 1500))
    rows = rows[: len(rows) // 2] + b"\xff" * (len(rows) // 2)
    data = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", 2000, 1500, 8, 0, 0, 0, 0)
    for name, body in ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + name + body
        data += struct.pack(">I", zlib.crc32(name + body))
    path.write_bytes(data)


def test_a_damaged_picture_is_named_and_skipped(folder: Path) -> None:
    data = (folder / "1.jpg").read_bytes()
    (folder / "1.jpg").write_bytes(data[: len(data) // 2])
    info = dataset_info.read(folder)
    assert [path.name for path in info.instance_images] == ["0.jpg", "2.jpg"]
    (warning,) = info.warnings
    assert warning.startswith("Skipped 1 picture in the training folder that cannot be used: 1.jpg")


def test_nothing_left_is_one_sentence(folder: Path) -> None:
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    (folder / "more").mkdir()
    with pytest.raises(DatasetError) as caught:
        dataset_info.read(folder)
    message = str(caught.value)
    for words in (str(folder), "unusable: 0.jpg", "more/", "PNG, JPEG, WebP", "sub-folders"):
        assert words in message
    assert "\n" not in message


def test_an_empty_folder_is_one_sentence(folder: Path) -> None:
    for number in range(3):
        (folder / f"{number}.jpg").unlink()
    with pytest.raises(DatasetError, match=r"holds no picture to train on: put 4 to 20 pictures"):
        dataset_info.read(folder)


def test_a_missing_folder_or_a_file_in_its_place(folder: Path) -> None:
    with pytest.raises(DatasetError, match=r"nowhere cannot be opened \(No such file"):
        dataset_info.read(folder / "nowhere")
    with pytest.raises(DatasetError, match=r"0\.jpg is a file, not a folder"):
        dataset_info.read(folder / "0.jpg")
    with pytest.raises(DatasetError, match="cannot be opened"):
        dataset_info.read(Path("nul\0"))


def test_prior_preservation_asks_for_a_class_prompt(folder: Path) -> None:
    (folder / "dataset_info.json").write_text("{'instance_prompt': 'a photo of a riobugger cat'}")
    info = dataset_info.read(folder)
    assert info.class_prompt is None
    assert len(info.warnings) == 1
    with pytest.raises(DatasetError, match="no class_prompt"):
        dataset_info.read(folder, with_prior_preservation=True)


def test_the_folder_is_never_written_to(folder: Path) -> None:
    picture(folder / "class_data_dir" / "0.png")
    before = snapshot(folder)
    for path in [*folder.iterdir(), folder]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        dataset_info.read(folder, with_prior_preservation=True)
    finally:
        for path in [folder, *folder.iterdir()]:
            path.chmod(0o755)
    assert snapshot(folder) == before


def test_a_relative_folder_works(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(folder / "class_data_dir" / "0.png")
    monkeypatch.chdir(folder)
    info = dataset_info.read(Path("."), with_prior_preservation=True)
    assert len(info.instance_images) == 3
    assert len(info.class_images) == 1
    assert info.warnings == ()


def test_bombs_are_skipped_by_the_caps_given(folder: Path) -> None:
    picture(folder / "big.png", (200, 200))
    info = dataset_info.read(folder, limits=replace(LIMITS, max_image_pixels=10_000))
    assert len(info.instance_images) == 3
    assert "big.png (is 200 x 200, more than the 10000 pixels allowed)" in info.warnings[0]


def test_small_and_strange_pictures_are_reported(folder: Path) -> None:
    picture(folder / "strip.png", (600, 100))
    info = dataset_info.read(folder)
    assert len(dataset_info.size_warnings(info, 64)) == 4
    (sentence,) = dataset_info.size_warnings(info, 60)
    assert sentence.startswith("strip.png is 600 x 100 pixels: a square crop keeps only 16 %")
