from __future__ import annotations

import dataclasses
import io
import os
import random
import shutil
import stat
import tarfile
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from dreambooth.errors import ModelArtifactError, ResourceError
from dreambooth.limits import LIMITS
from dreambooth.model_folder import archives

MODEL = {
    "model_index.json": b'{"_class_name": "StableDiffusionPipeline"}',
    "unet/config.json": b'{"sample_size": 8}',
    "unet/diffusion_pytorch_model.safetensors": random.Random(0).randbytes(300_000),
    "tokenizer/merges.txt": b"",
}


def entry(
    name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, **fields: object
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def write(
    path: Path,
    entries: Iterable[tuple[tarfile.TarInfo, bytes]],
    *,
    mode: str = "w:gz",
    format: int = tarfile.PAX_FORMAT,
) -> Path:
    with tarfile.open(path, mode, format=format) as tar:  # type: ignore[call-overload]
        for info, content in entries:
            tar.addfile(info, io.BytesIO(content))
    return path


def raw_header(name: bytes, size: int, kind: bytes = b"0") -> bytes:
    """Return a tar header with a valid checksum that tarfile itself would not write."""
    block = bytearray(tarfile.TarInfo("x").tobuf(tarfile.GNU_FORMAT))
    block[0:100] = name.ljust(100, b"\0")
    block[124:136] = b"%011o\0" % size
    block[156:157] = kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(content: bytes) -> bytes:
    return content + b"\0" * (-len(content) % 512)


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """Return a function that asserts that an archive is refused, and returns the message.

    It extracts beside another folder and asserts that nothing was written or changed there.
    """

    def check(archive: Path, **limits: object) -> str:
        place = tmp_path / "place"
        (place / "victim").mkdir(parents=True)
        (place / "victim" / "file").write_bytes(b"precious")
        for existed in (False, True):
            destination = place / "destination"
            if existed:
                destination.mkdir()
            with pytest.raises(ModelArtifactError) as caught:
                archives.extract(
                    archive,
                    destination,
                    limits=dataclasses.replace(LIMITS, **limits),  # type: ignore[arg-type]
                )
            assert destination.exists() == existed
            assert tree(place) == {"victim/file": b"precious"}
            assert sum(1 for _ in place.rglob("*")) == 2 + existed
        message = str(caught.value)
        assert str(archive) in message
        assert "\n" not in message
        return message

    return check


@pytest.mark.parametrize("prefix", ["", "./"])
@pytest.mark.parametrize("mode", ["w:gz", "w"])
@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_a_proper_archive_is_unpacked(tmp_path: Path, prefix: str, mode: str, format: int) -> None:
    entries = [entry(prefix + name, content) for name, content in MODEL.items()]
    if prefix:
        entries.insert(0, entry("./", kind=tarfile.DIRTYPE))
        entries.insert(1, entry("./unet/", kind=tarfile.DIRTYPE))
        entries.append(entry("./empty", kind=tarfile.DIRTYPE))
    archive = write(tmp_path / "model.tar.gz", entries, mode=mode, format=format)

    archives.extract(archive, tmp_path / "a" / "b")

    assert tree(tmp_path / "a" / "b") == MODEL
    assert (tmp_path / "a" / "b" / "empty").is_dir() == bool(prefix)


def test_an_archive_of_the_tar_program(tmp_path: Path) -> None:
    long = "/".join(["folder-" + "n" * 60] * 4) + "/file.json"
    content = {**MODEL, long: b"deep"}
    for name, data in content.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)
    for format in ("gnu", "pax", "ustar", "oldgnu"):
        archive = tmp_path / f"{format}.tgz"
        if os.system(f"tar --format={format} -C {tmp_path}/in -czf {archive} . 2>{os.devnull}"):
            continue  # the ustar format cannot hold such a name
        archives.extract(archive, tmp_path / format)
        assert tree(tmp_path / format) == content


def test_what_the_archive_says_of_owners_and_rights_is_ignored(tmp_path: Path) -> None:
    archive = write(
        tmp_path / "model.tar.gz",
        [
            entry("d", kind=tarfile.DIRTYPE, mode=0),
            entry("d/f", b"x", mode=0o7777, uid=12345, mtime=1),
            entry("e/f", b"x", mode=0),
        ],
    )
    before = os.umask(0o022)
    try:
        archives.extract(archive, tmp_path / "out")
    finally:
        os.umask(before)
    for name, mode in {"d": 0o755, "e": 0o755, "d/f": 0o644, "e/f": 0o644}.items():
        found = (tmp_path / "out" / name).stat()
        assert stat.S_IMODE(found.st_mode) == mode
        assert found.st_uid == os.getuid()
        assert found.st_mtime > 1


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_and_foreign_names(tmp_path: Path, format: int) -> None:
    names = ["unet/" + "n" * 200 + ".json", "größe/猫.txt", "/".join(["d" * 60] * 5)]
    archive = write(tmp_path / "a.tar.gz", [entry(n, b"1") for n in names], format=format)

    archives.extract(archive, tmp_path / "out")

    assert sorted(tree(tmp_path / "out")) == sorted(names)
    assert archives.member_names(archive) == names


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("/etc/passwd", "an absolute path"),
        ("//x", "an absolute path"),
        ("C:/x", "an absolute path"),
        ("c:x", "an absolute path"),
        ("../x", "leads out"),
        ("a/../../x", "leads out"),
        ("a/..", "leads out"),
        ("./../x", "leads out"),
        ("..\\x", "a backslash"),
        ("a\\..\\..\\x", "a backslash"),
        ("a\nb", "a control character"),
        ("a\x1b[2Jb", "a control character"),
        ("a/" + "n" * 256, "too long a name"),
        ("/".join(["n" * 200] * 6), "too long a name"),
        ("n" * 4096, "too long a name"),
        ("/".join("abcdefghijklmnopqr"), "folders deep"),
        (".", "a file without a name"),
        ("./", "a file without a name"),
    ],
)
@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_names_that_are_refused(
    tmp_path: Path, refused: Callable[..., str], name: str, told: str, format: int
) -> None:
    archive = write(tmp_path / "a.tar.gz", [entry("ok", b"1"), entry(name, b"2")], format=format)
    message = refused(archive)
    assert told in message
    assert len(message) < len(str(archive)) + 200


def test_nul_and_other_bytes_in_names(tmp_path: Path, refused: Callable[..., str]) -> None:
    archive = tmp_path / "a.tar"
    record = b"17 path=../a\0bcd\n"
    archive.write_bytes(
        raw_header(b"h", len(record), b"x") + padded(record) + raw_header(b"ok", 0) + b"\0" * 1024
    )
    assert "a control character" in refused(archive)


def test_names_that_are_not_utf8(tmp_path: Path, refused: Callable[..., str]) -> None:
    archive = tmp_path / "a.tar"
    archive.write_bytes(raw_header(b"caf\xe9", 0) + b"\0" * 1024)
    assert "not UTF-8" in refused(archive)
    assert archives.member_names(archive) == []


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (tarfile.SYMTYPE, "a symbolic link"),
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.BLKTYPE, "a device"),
        (tarfile.FIFOTYPE, "a FIFO"),
        (tarfile.GNUTYPE_SPARSE, "a sparse file"),
        (b"V", "of no known kind"),
        (b"M", "of no known kind"),
        (b"Z", "of no known kind"),
    ],
)
def test_kinds_that_are_refused(
    tmp_path: Path, refused: Callable[..., str], kind: bytes, told: str
) -> None:
    archive = tmp_path / "a.tar"
    archive.write_bytes(
        raw_header(b"ok", 2) + padded(b"ok") + raw_header(b"model", 0, kind) + b"\0" * 1024
    )
    assert f"'model' is {told}" in refused(archive)
    assert archives.member_names(archive) == ["ok"]


def test_sparse_files_of_pax(tmp_path: Path, refused: Callable[..., str]) -> None:
    headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9" * 15}
    archive = write(tmp_path / "a.tar.gz", [entry("s", b"0\n", pax_headers=headers)])
    assert "a sparse file" in refused(archive)


@pytest.mark.parametrize("target", ["../victim", "/tmp", "."])
def test_a_link_and_then_a_file_through_it(
    tmp_path: Path, refused: Callable[..., str], target: str
) -> None:
    archive = write(
        tmp_path / "a.tar.gz",
        [entry("link", kind=tarfile.SYMTYPE, linkname=target), entry("link/file", b"owned")],
    )
    assert "a symbolic link" in refused(archive)


def test_the_escape_by_nested_links(tmp_path: Path, refused: Callable[..., str]) -> None:
    """The links shorten a path through sixteen folders whose real path exceeds PATH_MAX."""
    entries = []
    path = ""
    for letter in "abcdefghijklmnop":
        folder = "d" * 247
        entries.append(entry(path + folder, kind=tarfile.DIRTYPE))
        entries.append(entry(path + letter, kind=tarfile.SYMTYPE, linkname=folder))
        path += f"{letter}/"
    entries.append(entry(path + "l" * 254, kind=tarfile.SYMTYPE, linkname="../" * 16))
    entries.append(entry("escape", kind=tarfile.SYMTYPE, linkname=path + "l" * 254 + "/../victim"))
    entries.append(entry("hard", kind=tarfile.LNKTYPE, linkname="escape/file"))
    entries.append(entry("hard", b"overwritten"))
    refused(write(tmp_path / "a.tar.gz", entries))


@pytest.mark.parametrize(
    "names",
    [
        ["a", "a"],
        ["a", "./a"],
        ["a//b", "a/b"],
        ["a", "A"],
        ["unet/x", "UNET/y"],
        ["straße", "STRASSE"],
        [unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é")],
        ["a", "a/b"],
        ["a/b", "a"],
    ],
)
def test_two_members_may_not_mean_one_file(
    tmp_path: Path, refused: Callable[..., str], names: list[str]
) -> None:
    message = refused(write(tmp_path / "a.tar.gz", [entry(name, b"1") for name in names]))
    assert "is there twice" in message or "mean the same file" in message


def test_folders_may_be_named_again(tmp_path: Path) -> None:
    entries = [
        entry("a/f", b"1"),
        entry("a", kind=tarfile.DIRTYPE),
        entry("./a/", kind=tarfile.DIRTYPE),
    ]
    archives.extract(write(tmp_path / "a.tar.gz", entries), tmp_path / "out")
    assert tree(tmp_path / "out") == {"a/f": b"1"}


def test_an_empty_archive_and_none(tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "holds no files" in refused(write(tmp_path / "a.tar.gz", []))
    with pytest.raises(ModelArtifactError, match="no archive"):
        archives.extract(tmp_path / "none.tar.gz", tmp_path / "out")
    os.mkfifo(tmp_path / "fifo.tar.gz")
    with pytest.raises(ModelArtifactError, match="no archive"):
        archives.member_names(tmp_path / "fifo.tar.gz")


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    archive = write(tmp_path / "a.tar.gz", [entry("f", b"new")])
    out = tmp_path / "out"
    out.mkdir()
    (out / "f").write_bytes(b"old")
    with pytest.raises(ModelArtifactError, match="not empty"):
        archives.extract(archive, out)
    assert tree(out) == {"f": b"old"}
    with pytest.raises(ResourceError, match="Cannot unpack into"):
        archives.extract(archive, out / "f")


def test_a_full_disk_is_a_resource_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    signal = pytest.importorskip("signal")
    archive = write(tmp_path / "a.tar.gz", [entry("big", random.Random(1).randbytes(3_000_000))])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(ResourceError, match=r"'big' of .* cannot be written"):
            archives.extract(archive, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert not (tmp_path / "out").exists()


def test_listing_stops_early(tmp_path: Path) -> None:
    archive = write(tmp_path / "a.tar.gz", [entry(n, c) for n, c in MODEL.items()])
    data = archive.read_bytes()
    archive.write_bytes(data[: len(data) // 2])

    assert archives.member_names(archive, stop_at=["model_index.json"]) == ["model_index.json"]
    with pytest.raises(ModelArtifactError):
        archives.member_names(archive)


def test_listing_of_the_top_level(tmp_path: Path) -> None:
    entries = [entry("./" + n, c) for n, c in MODEL.items()]
    archive = write(tmp_path / "a.tar.gz", [*entries, entry("l", kind=tarfile.SYMTYPE)])

    assert archives.member_names(archive) == list(MODEL)
    assert archives.member_names(archive, top_level_only=True) == ["model_index.json"]


@pytest.mark.parametrize("seed", range(8))
def test_flipped_bytes_never_reach_outside_nor_raise_anything_else(
    tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    entries = [entry(n, c[:2000]) for n, c in MODEL.items()]
    entries.append(entry("n" * 150, b"1", pax_headers={"comment": "x" * 50}))
    format = rng.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
    original = write(tmp_path / "a.tar", entries, mode="w", format=format).read_bytes()
    inside = tmp_path / "inside"
    inside.mkdir()
    for _ in range(60):
        data = bytearray(original)
        for _ in range(rng.randint(1, 4)):
            start = rng.randrange(0, len(data) // 512) * 512
            position = start + rng.randrange(512)
            data[position] = rng.randrange(256)
            # Mostly fix the checksum, which would otherwise reject every damaged header.
            if rng.random() < 0.7:
                block = data[start : start + 512]
                block[148:156] = b" " * 8
                data[start + 148 : start + 156] = b"%06o\0 " % sum(block)
        archive = tmp_path / "b.tar"
        archive.write_bytes(data)
        try:
            archives.extract(archive, inside / "out")
        except (ModelArtifactError, ResourceError):
            assert list(inside.iterdir()) == []
        else:
            assert {path.name for path in inside.iterdir()} == {"out"}
            assert not any(path.is_symlink() for path in inside.rglob("*"))
            shutil.rmtree(inside / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "b.tar", "inside"]
