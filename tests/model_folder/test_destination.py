from __future__ import annotations

import errno
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors import SafetensorError

from dreambooth.errors import ResourceError, UserError
from dreambooth.model_folder import destination

Contents = dict[str, bytes]


def contents(folder: Path) -> Contents:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def put(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def mark(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "__model_info__.json").write_text(json.dumps({"resolution": 64, **destination.MARK}))
    return folder


def test_clear_removes_an_earlier_run_and_nothing_else(tmp_path: Path) -> None:
    model_dir, outside = mark(tmp_path / "model"), put(tmp_path / "outside", "precious")
    put(model_dir, "model_index.json", "unet/config.json", "samples/1.png", "README.md")
    put(model_dir, "hyperparameters.json", ".partial-abc_1234/half")
    kept = {"mine.txt", "unet_of_mine/x", "code/inference.py", ".partial-of-a-film.mp4"}
    put(model_dir, *kept)
    (model_dir / "safety_checker").symlink_to(outside)
    (model_dir / ".partial-link").symlink_to(outside)
    before = contents(model_dir)
    destination.check(model_dir)
    assert contents(model_dir) == before
    destination.clear(model_dir)
    assert contents(model_dir).keys() == kept
    assert contents(outside).keys() == {"precious"}
    destination.clear(model_dir)
    assert contents(model_dir).keys() == kept


@pytest.mark.parametrize("names", [[], [".partial-abc_1234/half"]])
def test_a_folder_without_a_model_is_made_ready(tmp_path: Path, names: list[str]) -> None:
    put(tmp_path, *names)
    for folder in (tmp_path, tmp_path / "a" / "b"):
        destination.check(folder)
        destination.clear(folder)
        assert not list(folder.iterdir()) or folder == tmp_path
    assert contents(tmp_path) == {}
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b")
    destination.check(tmp_path / "link")
    destination.clear(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize(
    ("names", "named"),
    [
        (["model_index.json", "unet/x", "text_encoder_2/x"], "unet, model_index.json"),
        (["hyperparameters.json", "notes.txt"], r"hyperparameters\.json"),
        (["hyperparameters.json", "model_index.json", "vae/x"], r"hyperparameters\.json"),
        (["README.md"], r"README\.md"),
        (["samples/holiday.jpg"], "samples"),
        (["tokenizer/x"], "tokenizer"),
        (["__model_info__.json", "model_index.json", ".partial-abc_1234/half"], "__model_info__"),
        (["unet/x", "vae/x", "text_encoder/x", "tokenizer/x", "scheduler/x"], "and 2 more"),
    ],
)
def test_what_no_run_of_ours_wrote_is_refused_and_untouched(
    tmp_path: Path, names: list[str], named: str
) -> None:
    before = contents(put(tmp_path, *names))
    with pytest.raises(UserError, match=named) as caught:
        destination.check(tmp_path, elsewhere="choose another --model_dir")
    assert "choose another --model_dir" in str(caught.value)
    assert contents(tmp_path) == before
    destination.clear(tmp_path)
    assert contents(tmp_path).keys() == {name for name in before if ".partial-" not in name}


@pytest.mark.parametrize("info", ["[1]", "{", '{"written_by": "somebody"}', "{}"])
def test_a_mark_that_is_not_ours_is_none(tmp_path: Path, info: str) -> None:
    (tmp_path / "__model_info__.json").write_text(info)
    with pytest.raises(UserError, match="not written by an earlier run"):
        destination.check(tmp_path)


def test_the_folder_of_the_base_model_is_refused(tmp_path: Path) -> None:
    base = mark(tmp_path / "model" / "inner")
    (tmp_path / "link").symlink_to(base)
    for model_dir in (base, base.parent, tmp_path / "link"):
        with pytest.raises(UserError, match="over the base model"):
            destination.check(model_dir, base_folder=base)
    assert contents(base).keys() == {"__model_info__.json"}


def a_file(tmp_path: Path) -> Path:
    (tmp_path / "file").touch()
    return tmp_path / "file"


def below_a_file(tmp_path: Path) -> Path:
    return a_file(tmp_path) / "model"


def a_dangling_link(tmp_path: Path) -> Path:
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "model")
    return tmp_path / "dangling"


def a_loop(tmp_path: Path) -> Path:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    return tmp_path / "loop"


def in_proc(tmp_path: Path) -> Path:
    return Path("/proc/no/model")


def a_name_too_long(tmp_path: Path) -> Path:
    return tmp_path / ("x" * 300)


@pytest.mark.parametrize(
    "place", [a_file, below_a_file, a_dangling_link, a_loop, in_proc, a_name_too_long]
)
def test_a_place_where_no_folder_can_be_is_reported_at_the_start(
    tmp_path: Path, place: Callable[[Path], Path]
) -> None:
    model_dir = place(tmp_path)
    with pytest.raises(ResourceError, match="not a folder") as caught:
        destination.check(
            model_dir, base_folder=tmp_path / "base", elsewhere="choose another --model_dir"
        )
    assert str(model_dir) in str(caught.value)
    assert "choose another --model_dir" in str(caught.value)
    assert "space" not in str(caught.value)


def test_a_folder_that_is_not_ours_to_write_is_reported_at_the_start(
    unprivileged_folder: Path,
) -> None:
    closed = unprivileged_folder / "closed"
    closed.mkdir(mode=0o555)
    for model_dir in (closed, closed / "model"):
        with pytest.raises(ResourceError, match="not writable") as caught:
            destination.check(model_dir)
        assert "space" not in str(caught.value)


@pytest.fixture
def full_disk() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_is_reported_at_the_start_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="export_precision=fp16"):
        destination.check(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        *((number, "free some space") for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)),
        *((number, "not writable") for number in (errno.EACCES, errno.EPERM, errno.EROFS)),
        *((number, "not a folder") for number in (errno.ENOTDIR, errno.EEXIST, errno.ENOENT)),
        (errno.EIO, "the disk is at fault"),
    ],
)
def test_the_advice_follows_the_fault(tmp_path: Path, number: int, advice: str) -> None:
    text = os.strerror(number)
    # The safetensors library words the same faults like this.
    in_words = SafetensorError(f"Error while serializing: I/O error: {text} (os error {number})")
    for error in (OSError(number, text), in_words):
        with (
            pytest.raises(ResourceError, match=advice) as caught,
            destination.disk_faults_named(tmp_path),
        ):
            raise error
        assert ("free some space" in str(caught.value)) == (advice == "free some space")
