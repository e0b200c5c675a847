from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from dreambooth.process import files


def test_two_folders_change_places(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "deep" / "old").mkdir(parents=True)
    (tmp_path / "new" / "a").write_text("1")
    (tmp_path / "deep" / "old" / "b").write_text("2")
    files.exchange(tmp_path / "new", tmp_path / "deep" / "old")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["b"]
    assert [path.name for path in (tmp_path / "deep" / "old").iterdir()] == ["a"]
    with pytest.raises(FileNotFoundError, match="none"):
        files.exchange(tmp_path / "none", tmp_path / "new")


def test_a_file_gets_a_second_name_or_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_text("1")
    os.symlink("a", tmp_path / "link")
    files.link_or_copy(tmp_path / "a", tmp_path / "b")
    files.link_or_copy(tmp_path / "link", tmp_path / "second")
    assert (tmp_path / "a").stat().st_nlink == 2
    assert os.readlink(tmp_path / "second") == "a"

    def unable(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", unable)
    files.link_or_copy(tmp_path / "a", tmp_path / "c")
    files.link_or_copy(tmp_path / "link", tmp_path / "third")
    assert (tmp_path / "c").read_text() == "1"
    assert (tmp_path / "a").stat().st_nlink == 2
    assert os.readlink(tmp_path / "third") == "a"
