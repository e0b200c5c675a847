from __future__ import annotations

import dataclasses
import gzip
import io
import random
import tarfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from dreambooth.errors import ModelArtifactError
from dreambooth.limits import LIMITS, Limits
from dreambooth.model_folder import archives
from dreambooth.model_folder.tar_stream import Tar

MODEL = {
    "model_index.json": b'{"_class_name": "StableDiffusionPipeline"}',
    "unet/config.json": b'{"sample_size": 8}',
    "unet/diffusion_pytorch_model.safetensors": random.Random(0).randbytes(300_000),
    "tokenizer/merges.txt": b"",
}


def pack(
    path: Path,
    contents: Mapping[str, bytes],
    *,
    mode: str = "w:gz",
    pax_headers: Mapping[str, str] | None = None,
) -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            info.pax_headers = dict(pax_headers or {})
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


def read(archive: Path, limits: Limits = LIMITS) -> dict[str, bytes]:
    """Read an archive to its end; return every member's content by name."""
    with Tar(archive, limits) as tar:
        contents = {member.name: b"".join(tar.content()) for member in tar.members()}
        tar.finish()
    return contents


def unpacked(archive: Path) -> dict[str, bytes]:
    """Unpack an archive with `archives.extract`; return the files' contents by path."""
    folder = archive.with_name("out")
    archives.extract(archive, folder)
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """Return a function that asserts that an archive is refused, and returns the message.

    It asserts that the reader and the extractor give the same message and leave nothing behind.
    """

    def check(archive: Path, **changes: object) -> str:
        limits = dataclasses.replace(LIMITS, **changes)  # type: ignore[arg-type]
        with pytest.raises(ModelArtifactError) as caught:
            read(archive, limits)
        message = str(caught.value)
        place = tmp_path / "place"
        (place / "victim").mkdir(parents=True, exist_ok=True)
        (place / "victim" / "file").write_bytes(b"precious")
        for existed in (False, True):
            if existed:
                (place / "destination").mkdir()
            with pytest.raises(ModelArtifactError) as caught:
                archives.extract(archive, place / "destination", limits=limits)
            assert str(caught.value) == message
            assert (place / "destination").exists() == existed
            assert (place / "victim" / "file").read_bytes() == b"precious"
            assert sum(1 for _ in place.rglob("*")) == 2 + existed
        (place / "destination").rmdir()
        assert str(archive) in message
        assert "\n" not in message
        return message

    return check


def test_pax_headers_are_read_and_their_extras_ignored(tmp_path: Path) -> None:
    extras = {"comment": "a\nb=c", "SCHILY.xattr.user.x": "y", "mtime": "1.5"}
    archive = pack(tmp_path / "a.tar.gz", {"f": b"data"}, pax_headers=extras)
    assert read(archive) == unpacked(archive) == {"f": b"data"}


def test_git_archives_have_a_global_comment(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", pax_headers={"comment": "0" * 40}) as tar:
        info = tarfile.TarInfo("f")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    assert read(path) == unpacked(path) == {"f": b"x"}


def test_concatenated_gzip_streams_and_padding(tmp_path: Path) -> None:
    plain = pack(tmp_path / "a.tar", MODEL, mode="w")
    data = plain.read_bytes()
    parts = [gzip.compress(data[i : i + 100_000]) for i in range(0, len(data), 100_000)]
    archive = tmp_path / "a.tar.gz"
    archive.write_bytes(b"".join(parts) + b"\0" * 3_000_000)

    assert read(archive) == unpacked(archive) == MODEL


@pytest.mark.parametrize("where", ["content", "header", "after the end"])
def test_a_gzip_bomb_is_refused_early(
    tmp_path: Path, refused: Callable[..., str], where: str
) -> None:
    size = 100_000_000
    archive = tmp_path / "bomb.tar.gz"
    with gzip.open(archive, "wb", compresslevel=1) as file:
        if where == "content":
            file.write(raw_header(b"zeros", size))
        elif where == "header":
            file.write(raw_header(b"zeros", size, b"x"))
        else:
            file.write(raw_header(b"ok", 0) + b"\0" * 1024)
        for _ in range(size // 1_000_000):
            file.write(bytes(1_000_000))
    start = time.monotonic()
    message = refused(archive)
    assert "bomb" in message or "a header of" in message
    assert time.monotonic() - start < 10


def test_small_files_that_compress_well_are_fine(tmp_path: Path) -> None:
    archive = pack(tmp_path / "a.tar.gz", {"zeros": bytes(10_000_000)})
    assert len(read(archive)["zeros"]) == len(unpacked(archive)["zeros"]) == 10_000_000


def test_too_many_bytes_are_refused_before_any_is_written(
    tmp_path: Path, refused: Callable[..., str]
) -> None:
    archive = tmp_path / "a.tar"
    archive.write_bytes(raw_header(b"weights", 8**11 - 1))
    assert "unpacks to more than 1000000 bytes" in refused(archive, archive_max_bytes=1_000_000)
    assert "cut short" in refused(archive)


def test_too_many_members(tmp_path: Path, refused: Callable[..., str]) -> None:
    archive = tmp_path / "a.tar.gz"
    headers = b"".join(raw_header(b"%d" % i, 0) for i in range(2500))
    archive.write_bytes(gzip.compress(headers, 1))
    start = time.monotonic()
    assert "more than 2000 members" in refused(archive)
    assert time.monotonic() - start < 20


def test_endless_headers_without_a_member(tmp_path: Path, refused: Callable[..., str]) -> None:
    archive = tmp_path / "a.tar"
    record = padded(b"11 a=bcdef\n")
    archive.write_bytes((raw_header(b"h", 11, b"x") + record) * 1000)
    assert "more than 10 members" in refused(archive, archive_max_members=10)


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
def test_huge_headers_are_not_read_into_memory(
    tmp_path: Path, refused: Callable[..., str], kind: bytes
) -> None:
    archive = tmp_path / "a.tar"
    with archive.open("wb") as file:
        file.write(raw_header(b"h", 4_000_000_000, kind))
        file.truncate(4_000_001_024)  # a sparse file, which takes no disk space
    assert "a header of 4000000000 bytes" in refused(archive)


@pytest.mark.parametrize(
    "record",
    [b"99 path=x\n", b"0 path=x\n", b"x path=x\n", b"5 a=b\n", b"-7 a=b\n", b"10 size=-1\n",
     b"12 size=1e9\n"],
)  # fmt: skip
def test_damaged_pax_records(tmp_path: Path, refused: Callable[..., str], record: bytes) -> None:
    archive = tmp_path / "a.tar"
    archive.write_bytes(
        raw_header(b"h", len(record), b"x") + padded(record) + raw_header(b"f", 0) + b"\0" * 1024
    )
    refused(archive)


def test_a_global_header_may_not_rename_what_follows(
    tmp_path: Path, refused: Callable[..., str]
) -> None:
    record = b"11 path=xy\n"
    archive = tmp_path / "a.tar"
    archive.write_bytes(
        raw_header(b"h", len(record), b"g") + padded(record) + raw_header(b"f", 0) + b"\0" * 1024
    )
    assert "global header" in refused(archive)


def test_negative_sizes(tmp_path: Path, refused: Callable[..., str]) -> None:
    block = bytearray(raw_header(b"f", 0))
    block[124:136] = b"\xff" * 12
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    archive = tmp_path / "a.tar"
    archive.write_bytes(bytes(block) + b"\0" * 1024)
    refused(archive)


@pytest.mark.parametrize("mode", ["w:gz", "w"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.99])
def test_archives_that_were_cut_short(
    tmp_path: Path, refused: Callable[..., str], mode: str, share: float
) -> None:
    archive = pack(tmp_path / "a.tar", MODEL, mode=mode)
    data = archive.read_bytes().rstrip(b"\0")
    archive.write_bytes(data[: int(len(data) * share)])
    assert "cut short" in refused(archive)


def test_a_cut_in_the_gap_that_is_skipped(tmp_path: Path) -> None:
    archive = pack(tmp_path / "a.tar", {"big": bytes(5_000_000)}, mode="w")
    with archive.open("rb+") as file:
        file.truncate(3_000_000)
    with pytest.raises(ModelArtifactError, match="cut short"):
        archives.member_names(archive)  # this reads no content


@pytest.mark.parametrize("position", [0.2, 0.5, 1.0])
def test_a_damaged_gzip(tmp_path: Path, refused: Callable[..., str], position: float) -> None:
    archive = pack(tmp_path / "a.tar.gz", MODEL)
    data = bytearray(archive.read_bytes())
    index = min(int(len(data) * position), len(data) - 6)  # 1.0 damages the checksum
    data[index] ^= 0xFF
    archive.write_bytes(data)
    assert "is damaged" in refused(archive)


@pytest.mark.parametrize(
    "content", [b"PK\x03\x04" + b"x" * 2000, b"x" * 5000, b"\x80\x02}q\x00." * 200]
)
def test_what_is_no_tar(tmp_path: Path, refused: Callable[..., str], content: bytes) -> None:
    archive = tmp_path / "model.tar.gz"
    archive.write_bytes(content)
    assert "not a tar archive" in refused(archive)
    archive.write_bytes(gzip.compress(content))
    assert "not a tar archive" in refused(archive)
