from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from dreambooth.data.folder import Pictures, read_pictures, skipped
from dreambooth.errors import DatasetError
from dreambooth.limits import LIMITS


def picture(path: Path, size: tuple[int, int] = (20, 10), kind: str = "PNG") -> Path:
    Image.effect_noise(size, 50).save(path, kind)
    return path


def read(folder: Path) -> Pictures:
    return read_pictures(folder, most=1000)


def test_pictures_are_sorted_and_measured(tmp_path: Path) -> None:
    for name in ("b.png", "a.png", "C.png", "noending"):
        picture(tmp_path / name)
    found = read(tmp_path)
    assert [path.name for path in found.paths] == ["C.png", "a.png", "b.png", "noending"]
    assert {(facts.width, facts.height) for facts in found.facts} == {(20, 10)}
    assert skipped(found, "here") == []


def test_only_a_sub_folder_is_ignored_by_name(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "riobugger_00.png")
    (tmp_path / "more").mkdir()
    found = read_pictures(tmp_path, ignored="riobugger_00.png", most=9)
    assert [path.name for path in found.paths] == ["a.png", "riobugger_00.png"]
    assert found.others == ("more/",)
    assert read_pictures(tmp_path, ignored="more", most=9).others == ()


def test_junk_is_skipped_in_one_line_that_names_it(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "._a.png")
    picture(tmp_path / ".hidden.png")
    picture(tmp_path / "Thumbs.db")
    for name in ("__MACOSX", ".ipynb_checkpoints", "more"):
        (tmp_path / name).mkdir()
        picture(tmp_path / name / "b.png")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "table.csv").write_text("a,b")
    found = read(tmp_path)
    assert [path.name for path in found.paths] == ["a.png"]
    (line,) = skipped(found, "the folder")
    assert line == (
        "Skipped 8 entries (no pictures) in the folder: ._a.png, .hidden.png, "
        ".ipynb_checkpoints/, Thumbs.db, __MACOSX/ and 3 more."
    )


def test_damaged_and_foreign_pictures_are_named_with_the_reason(tmp_path: Path) -> None:
    picture(tmp_path / "good.png")
    data = picture(tmp_path / "half.jpg", (300, 300), "JPEG").read_bytes()
    (tmp_path / "half.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "page.jpg").write_text("<html>not found</html>")
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    found = read(tmp_path)
    assert [path.name for path in found.paths] == ["good.png"]
    text = "; ".join(found.unusable)
    for name in ("half.jpg (is damaged", "empty.png (is empty)", "page.jpg (holds no"):
        assert name in text
    assert "phone.heic (is in HEIC format (save it as one of" in text
    assert "pipe.jpg (is not a regular file)" in text
    assert "loop.jpg (cannot be opened" in text
    (line,) = skipped(found, "the folder")
    assert line.startswith("Skipped 6 pictures in the folder that cannot be used: ")
    assert line.endswith(" and 1 more.")


def test_names_in_odd_encodings_do_not_crash_the_message(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9\n.txt")
    try:
        (tmp_path / name).write_text("x")
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    picture(tmp_path / os.fsdecode(b"katze\xe4.png"))
    found = read(tmp_path)
    assert len(found.paths) == 1
    (line,) = skipped(found, "the folder")
    line.encode("utf-8")
    assert "\n" not in line
    assert "caf\\udce9\\n.txt" in line


def test_thousands_of_stray_files_are_quick_and_one_line(tmp_path: Path) -> None:
    for number in range(3000):
        (tmp_path / f"{number:04}.txt").write_text("x")
    picture(tmp_path / "a.png")
    start = time.monotonic()
    found = read(tmp_path)
    assert time.monotonic() - start < 20  # would take longer if a decoder were tried on each
    (line,) = skipped(found, "the folder")
    assert len(line) < 300
    assert "and 2995 more" in line


def test_caps_on_entries_and_pictures(tmp_path: Path) -> None:
    for number in range(3):
        picture(tmp_path / f"{number}.png")
    with pytest.raises(DatasetError, match="holds 3 pictures, more than the 2 allowed"):
        read_pictures(tmp_path, most=2)
    with pytest.raises(DatasetError, match="more than 2 entries"):
        read_pictures(tmp_path, most=2, limits=replace(LIMITS, max_folder_entries=2))


def test_files_without_permission_are_named(unprivileged_folder: Path) -> None:
    picture(unprivileged_folder / "a.png").chmod(0)
    assert "a.png (cannot be opened (Permission denied))" in read(unprivileged_folder).unusable
