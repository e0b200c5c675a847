from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from dreambooth.errors import ResourceError
from dreambooth.process import temporary_folder

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_the_folder_is_gone_afterwards(tmp_path: Path) -> None:
    with temporary_folder.temporary() as folder:
        (folder / "model").mkdir()
        assert folder.parent == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_job_left_is_removed_and_a_living_ones_stays(tmp_path: Path) -> None:
    code = (
        "import time; from dreambooth.process import temporary_folder\n"
        "with temporary_folder.temporary() as folder:\n"
        "    (folder / 'big').write_text('x'); print(folder, flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={"TMPDIR": str(tmp_path)},
        text=True,
    ) as process:
        assert process.stdout is not None
        theirs = Path(process.stdout.readline().strip())
        with temporary_folder.temporary():
            assert (theirs / "big").is_file()
        process.kill()
        process.wait()
        assert theirs.is_dir()
        with temporary_folder.temporary() as mine:
            assert list(tmp_path.iterdir()) == [mine]


def test_a_given_folder_is_used_in_place_of_the_systems(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    with temporary_folder.temporary(disk) as folder:
        assert folder.parent == disk
        left = disk / folder.name.replace(folder.name[-4:], "left")
        left.mkdir()
        with temporary_folder.temporary(disk):
            assert folder.exists()
            assert not left.exists()
    assert list(disk.iterdir()) == []
    with (
        pytest.raises(ResourceError, match=f"cannot be written to {tmp_path / 'none'}"),
        temporary_folder.temporary(tmp_path / "none"),
    ):
        pass


def test_other_folders_and_links_are_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (tmp_path / "dreambooth-job-link").symlink_to(target)
    (tmp_path / "dreambooth-job-file").write_text("x")
    with temporary_folder.temporary():
        pass
    left = ["dreambooth-job-file", "dreambooth-job-link", "target"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left


def test_where_none_can_be_made_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(ResourceError, match="TMPDIR"), temporary_folder.temporary():
        pass


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"),
        *(OSError(n, os.strerror(n)) for n in (errno.EACCES, errno.EROFS, errno.ENOSPC)),
        *(OSError(n, os.strerror(n)) for n in (errno.EMFILE, errno.ENOLCK)),
    ],
)
@pytest.mark.parametrize("failing", ["tempfile.gettempdir", "tempfile.mkdtemp", "os.open"])
def test_each_fault_of_the_system_is_one_sentence(
    failing: str, error: OSError, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(failing, fail)
        with (
            pytest.raises(ResourceError, match=r"^The temporary folder .*TMPDIR name another"),
            temporary_folder.temporary(),
        ):
            pass
