from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from dreambooth import tiny
from dreambooth.errors import ModelArtifactError
from dreambooth.model_folder import source

Make = Callable[..., Path]


def pack(archive: Path, folder: Path, inside: str = ".", mode: str = "w:gz") -> Path:
    with tarfile.open(archive, mode) as tar:  # type: ignore[call-overload]
        tar.add(folder, arcname=inside)
    return archive


@pytest.fixture
def other_archive(tmp_path: Path) -> Path:
    folder = tmp_path / "nothing"
    folder.mkdir()
    (folder / "readme.txt").write_text("no model")
    return pack(tmp_path / "other.tar.gz", folder)


def test_the_embedded_model_is_used_only_when_asked_for_by_name(tmp_path: Path) -> None:
    assert source.locate("tiny", None).path == tiny.WEIGHTS
    assert source.locate("tiny", tmp_path).path == tiny.WEIGHTS
    for channel in (None, tmp_path / "missing", tmp_path):
        with pytest.raises(ModelArtifactError, match="--pretrained-model"):
            source.locate(None, channel)
        with pytest.raises(ModelArtifactError, match=r"give one with --model \(") as error:
            source.locate(None, channel, given="with --model")
        assert "pretrained" not in str(error.value)


def test_a_setting_goes_before_the_channel(make_model_folder: Make) -> None:
    asked, channel = make_model_folder(), make_model_folder()
    assert source.locate(str(asked), channel).path == asked
    assert source.locate(None, channel).path == channel
    assert source.locate("", channel).path == channel


def test_an_unpacked_folder_one_level_down_is_found(make_model_folder: Make) -> None:
    folder = make_model_folder()
    assert source.locate(None, folder.parent).path == folder
    make_model_folder(folder.parent / "second")
    with pytest.raises(ModelArtifactError, match="several models"):
        source.locate(None, folder.parent)


def test_an_archive_may_be_given_directly_or_in_a_folder(
    small_model_folder: Path, tmp_path: Path
) -> None:
    channel = tmp_path / "channel"
    channel.mkdir()
    # JumpStart's tarball is not called model.tar.gz.
    archive = pack(channel / "train-model-txt2img.tar.gz", small_model_folder)
    for found in (source.locate(str(archive), None), source.locate(None, channel)):
        assert (found.kind, found.path) == ("archive", archive)


def test_among_several_tarballs_model_tar_gz_goes_first_then_the_one_with_a_model(
    small_model_folder: Path, other_archive: Path, tmp_path: Path
) -> None:
    channel = tmp_path / "channel"
    channel.mkdir()
    (channel / "a-damaged.tar.gz").write_bytes(b"not an archive")
    other_archive.rename(channel / "b.tar.gz")
    with pytest.raises(ModelArtifactError, match="no tarball with a model"):
        source.locate(None, channel)
    model = pack(channel / "c.tar.gz", small_model_folder)
    assert source.locate(None, channel).path == model
    second = pack(channel / "d.tar", small_model_folder, mode="w")
    with pytest.raises(ModelArtifactError, match=r"c\.tar\.gz, d\.tar"):
        source.locate(None, channel)
    second.rename(channel / "model.tar.gz")
    assert source.locate(None, channel).path == channel / "model.tar.gz"


def test_a_hub_id_is_a_name_that_is_no_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = source.locate("stabilityai/stable-diffusion-2-1-base", None)
    assert (found.kind, found.path) == ("hub", None)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    with pytest.raises(ModelArtifactError, match="holds no model"):
        source.locate("owner/name", None)
    for name in ("/no/such/folder", "a/b/c", "missing", "../x", "models/sd.tar.gz", "a b/c"):
        with pytest.raises(ModelArtifactError, match="no model at"):
            source.locate(name, None)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sd.safetensors", "not a valid safetensors file"),
        ("v1-5-pruned.ckpt", "dreambooth convert FILE FOLDER"),
    ],
)
def test_what_is_no_safetensors_is_refused(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / name).write_bytes(bytes(100))
    for given in ((str(tmp_path / name), None), (None, tmp_path)):
        with pytest.raises(ModelArtifactError, match=words):
            source.locate(*given)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ModelArtifactError, match="neither a folder nor a tarball"):
        source.locate(str(tmp_path / "notes.txt"), None)
    with pytest.raises(ModelArtifactError, match=r"but notes\.txt"):
        source.locate(None, tmp_path)


@pytest.mark.parametrize("inside", [".", "my-model"])
@pytest.mark.parametrize(("name", "mode"), [("m.tar.gz", "w:gz"), ("m.tar", "w")])
def test_an_archive_becomes_a_folder(
    small_model_folder: Path, tmp_path: Path, inside: str, name: str, mode: str
) -> None:
    archive = pack(tmp_path / name, small_model_folder, inside, mode)
    found = source.locate(str(archive), None)
    for _ in range(2):  # the second attempt must start from an empty folder
        folder = source.open_source(found, tmp_path / "work")
        assert source.read_facts(folder) == source.read_facts(small_model_folder)


def test_a_folder_is_used_as_it_is(small_model_folder: Path, tmp_path: Path) -> None:
    found = source.locate(str(small_model_folder), None)
    assert source.open_source(found, tmp_path / "work") == small_model_folder
    assert not (tmp_path / "work").exists()


def test_an_archive_without_a_model_is_refused(other_archive: Path, tmp_path: Path) -> None:
    found = source.locate(str(other_archive), None)
    with pytest.raises(ModelArtifactError, match=r"other\.tar\.gz holds no model_index\.json"):
        source.open_source(found, tmp_path / "work")


def test_a_plan_looks_into_folders_and_small_archives(
    small_model_folder: Path, other_archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = pack(tmp_path / "m.tar.gz", small_model_folder)
    facts = source.read_facts(small_model_folder)
    assert source.peek(source.locate(str(small_model_folder), None)) == facts
    assert source.peek(source.locate(str(archive), None)) == facts
    assert source.peek(source.locate("owner/name", None)) is None
    assert source.peek_facts(other_archive) is None
    assert source.peek_facts(tmp_path / "missing.tar.gz") is None
    large = tmp_path / "large.tar.gz"
    with large.open("wb") as file:
        file.truncate(65 * 2**20)
    assert source.peek_facts(large) is None


def test_a_name_that_cannot_be_looked_up_is_one_sentence(unprivileged_folder: Path) -> None:
    closed = unprivileged_folder / "closed"
    closed.mkdir(mode=0)
    for name in (str(closed / "model"), "x" * 5000):
        with pytest.raises(ModelArtifactError, match="cannot be read"):
            source.locate(name, None)
    with pytest.raises(ModelArtifactError, match="There is no model at"):
        source.locate("~no-such-user-here/model", None)


def test_a_plan_refuses_a_model_that_cannot_be_trained(
    make_model_folder: Make, tmp_path: Path
) -> None:
    folder = make_model_folder(prediction_type="sample")
    archive = pack(tmp_path / "m.tar.gz", folder)
    for given in (folder, archive):
        with pytest.raises(ModelArtifactError, match="'epsilon' or 'v_prediction' can be trained"):
            source.peek(source.locate(str(given), None))
    # Drawing with such a model is still allowed.
    assert source.open_source(source.locate(str(folder), None), tmp_path) == folder


def test_a_folder_that_cannot_be_read_is_named(unprivileged_folder: Path) -> None:
    (unprivileged_folder / "closed").mkdir(mode=0)
    with pytest.raises(ModelArtifactError, match="closed"):
        source.locate(None, unprivileged_folder / "closed")
