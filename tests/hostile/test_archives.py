"""Model tarballs that would write elsewhere or fill the disk, or that are damaged."""

from __future__ import annotations

import gzip
import io
import os
import random
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Member = tuple[tarfile.TarInfo, bytes]


def file(name: str, data: bytes = b"{}", **fields: Any) -> Member:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def special(name: str, kind: bytes, target: str = "") -> Member:
    return file(name, b"", type=kind, linkname=target)


def link(name: str, target: str) -> Member:
    return special(name, tarfile.SYMTYPE, target)


def hard(name: str, target: str) -> Member:
    return special(name, tarfile.LNKTYPE, target)


def folder(name: str) -> Member:
    return special(name, tarfile.DIRTYPE)


def tar(*members: Member, pax: bool = True) -> bytes:
    buffer = io.BytesIO()
    kind = tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def zipped(data: bytes) -> bytes:
    return gzip.compress(data, 1, mtime=0)


def patched(data: bytes, at: int, value: bytes) -> bytes:
    """Overwrite bytes of a header and fix its checksum."""
    block = bytearray(data[:512])
    block[at : at + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + data[512:]


INDEX = file("model_index.json")
NAMES: dict[str, tuple[Member, ...]] = {
    "absolute": (file("/tmp/escaped"),),
    "absolute, slashes": (file("//tmp/escaped"),),
    "dot dot": (file("../escaped"),),
    "dot dot within": (file("unet/../../escaped"),),
    "dot dot that stays inside": (file("unet/../vae/x"),),
    "dot dot alone": (file(".."),),
    "dot dot folder": (folder("../escaped"),),
    "many dot dots": (file("../" * 40 + "etc/cron.d/x"),),
    "backslash": (file("..\\..\\escaped"),),
    "drive": (file("C:\\Windows\\x"),),
    "drive with slash": (file("c:/x"),),
    "line break": (file("a\nb"),),
    "escape code": (file("\x1b[2J"),),
    "delete": (file("a\x7fb"),),
    "not utf-8": (file("caf\udce9"),),
    "long part": (file("x" * 300),),
    "long path": (file("/".join(["x" * 200] * 8)),),
    "deep": (file("/".join("x" * 30)),),
    "no name": (file("."),),
}
LINKS: dict[str, tuple[Member, ...]] = {
    "link to a file": (link("model_index.json", "/etc/passwd"),),
    "link to the victim": (link("x", "../../victim/precious"),),
    "link inside": (INDEX, link("copy.json", "model_index.json")),
    "link to itself": (link("x", "x"),),
    "hard link out": (hard("x", "/etc/passwd"),),
    "hard link up": (hard("x", "../../victim/precious"),),
    "hard link inside": (INDEX, hard("copy.json", "model_index.json")),
    "write through a link": (link("x", "../../victim"), file("x/precious", b"gone")),
    "link for a folder": (link("unet", "/tmp"), file("unet/config.json")),
    "link over a folder": (folder("x"), link("x", "/tmp"), file("x/y")),
    "the nested escape": (
        # each link alone leads inside; together they lead out
        *(folder("a"), link("a/b", "."), link("a/b/c", "..")),
        *(link("a/b/c/d", ".."), file("a/b/c/d/victim/precious", b"gone")),
    ),
    "the long nested escape": (
        *(folder("d" * 120), link("s", "d" * 120), link("s/up", "..")),
        *(link("out", "s/up/.."), file("out/victim/precious", b"gone")),
    ),
    "a hard link to a link": (link("x", "../../victim/precious"), hard("y", "x")),
}
KINDS: dict[str, tuple[Member, ...]] = {
    "character device": (special("x", tarfile.CHRTYPE),),
    "block device": (special("x", tarfile.BLKTYPE),),
    "fifo": (special("model_index.json", tarfile.FIFOTYPE),),
    "contiguous of another kind": (special("x", b"Z"),),
    "multi-volume": (special("x", b"M"),),
    "volume label": (special("x", b"V"),),
    "sparse": (special("x", tarfile.GNUTYPE_SPARSE),),
    "sparse by pax": (file("x", pax_headers={"GNU.sparse.major": "1"}),),
    "sparse of an exabyte": (file("x", pax_headers={"GNU.sparse.size": str(2**60)}),),
}
TWICE: dict[str, tuple[Member, ...]] = {
    "same name": (INDEX, file("model_index.json", b"[]")),
    "same name with a dot": (INDEX, file("./model_index.json", b"[]")),
    "same name, two slashes": (file("unet/x"), file("unet//x")),
    "other case": (INDEX, file("MODEL_INDEX.json")),
    "folded": (file("straße"), file("STRASSE")),
    "composed": (file("é"), file("e\u0301")),
    "file, then folder": (file("unet"), file("unet/config.json")),
    "folder, then file": (file("unet/config.json"), file("unet")),
    "full width": (file("unet/x"), file("ｕｎｅｔ/x")),
}
MANY = tuple(file(f"f{n}", b"") for n in range(2_100))
WHOLE = tar(INDEX, file("unet/config.json", b"{}" * 600))
RAW: dict[str, bytes] = {
    "empty file": b"",
    "one byte": b"x",
    "text": b"this is no archive\n" * 100,
    "zeros": b"\0" * 10_240,
    "noise": random.Random(0).randbytes(5_000),
    "a zip": b"PK\x03\x04" + b"\0" * 1_000,
    "xz": b"\xfd7zXZ\0" + b"\0" * 600,
    "bzip2": b"BZh9" + b"\0" * 600,
    "zstd": b"\x28\xb5\x2f\xfd" + b"\0" * 600,
    "html": b"<html>Not Found</html>",
    "empty tar": tar(),
    "only folders": tar(folder("unet"), folder("vae")),
    "gzip magic alone": b"\x1f\x8b",
    "gzip of nothing": zipped(b""),
    "gzip of text": zipped(b"no tar in here" * 100),
    "gzip in gzip": zipped(zipped(WHOLE)),
    "gzip of a wrong checksum": zipped(WHOLE)[:-8] + b"\0" * 8,
    "gzip with a broken block": zipped(WHOLE)[:20] + b"\xff" * 40,
    "gzip with noise behind": zipped(WHOLE) + b"noise behind the stream",
    "header of a wrong checksum": b"X" + WHOLE[1:],
    "negative size": patched(WHOLE, 124, b"\xff" * 12),
    "exabyte": patched(WHOLE, 124, b"\x80" + b"\0" * 3 + b"\x10" + b"\0" * 7),
    "size of letters": patched(WHOLE, 124, b"hello world\0"),
    "size beyond the end": patched(WHOLE, 124, b"00077777777\0"),
    "pax size of letters": tar(file("x", pax_headers={"size": "many"})),
    "pax negative size": tar(file("x", pax_headers={"size": "-1"})),
    "pax size of an exabyte": tar(file("x", pax_headers={"size": str(2**60)})),
    "pax path out": tar(file("x", pax_headers={"path": "../escaped"})),
    "pax path absolute": tar(file("x", pax_headers={"path": "/etc/x"})),
    "pax header of two mebibytes": tar(file("x", pax_headers={"comment": "x" * 2**21})),
    "long name of two mebibytes": tar(file("x" * 2**21), pax=False),
    "too many members": tar(*MANY),
    "too many headers": tar(*(file("y" * 150 + str(n), b"") for n in range(2_100)), pax=False),
    "bomb of zeros": zipped(tar(file("x", b"\0" * 40 * 2**20))),
    "bomb of a folder's padding": zipped(tar(INDEX) + b"\0" * 40 * 2**20 + tar(INDEX)),
}
RAW |= {f"tar cut at {n}": WHOLE[:n] for n in (1, 100, 511, 513, 1_025, 2_000)}
RAW |= {f"gzip cut at {n}": zipped(WHOLE)[:n] for n in (3, 9, 11, 30, 60, len(zipped(WHOLE)) - 1)}
CASES = {
    name: tar(*members) for group in (NAMES, LINKS, KINDS, TWICE) for name, members in group.items()
}
CASES |= {f"{name}, old format": tar(*members, pax=False) for name, members in LINKS.items()}
CASES |= RAW


@pytest.fixture(autouse=True)
def _nothing_escapes() -> Iterator[None]:
    places = [Path("/tmp/escaped"), Path("/etc/cron.d/x"), Path("escaped"), Path("/etc/x")]
    yield
    assert not [place for place in places if place.exists()]


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_tarball_is_refused_by_name(sandbox: Any, name: str) -> None:
    sandbox.model = sandbox.root / "hostile.tar.gz"
    sandbox.model.write_bytes(CASES[name])
    sandbox.refuses("hostile.tar.gz")


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _loop(path: Path) -> None:
    path.symlink_to(path)


def _dangling(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize("make", [_fifo, _loop, _dangling, Path.mkdir])
def test_a_tarball_that_is_no_file(sandbox: Any, make: Callable[[Path], None]) -> None:
    sandbox.model = sandbox.root / "hostile.tar.gz"
    make(sandbox.model)
    sandbox.refuses("hostile.tar.gz")


def test_several_tarballs_of_which_none_is_a_model(sandbox: Any) -> None:
    sandbox.model = sandbox.root / "channel"
    sandbox.model.mkdir()
    for name in ("a.tar.gz", "b.tar.gz"):
        (sandbox.model / name).write_bytes(RAW["noise"])
    assert "b.tar.gz" in sandbox.refuses("a.tar.gz")
