from __future__ import annotations

import contextlib
import json
import os
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dreambooth.errors import ModelArtifactError
from dreambooth.limits import Limits
from dreambooth.model_folder.headers import read_header


def entry(begin: object = 0, end: object = 8, dtype: str = "F32", shape: object = None) -> dict:
    return {"dtype": dtype, "shape": [2] if shape is None else shape, "data_offsets": [begin, end]}


FIELDS = b'"dtype": "F32", "shape": [2], "data_offsets": [0, 8]'


def write(path: Path, header: object, data: bytes = b"\0" * 8, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def test_entries_come_in_the_order_of_the_header(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "b": entry(8, 12, "F16"),
        "a": entry(0, 8),
        "empty": entry(12, 12, shape=[0, 3]),
        "ids": entry(12, 28, "I64"),
    }
    found = read_header(write(tmp_path / "x.safetensors", header, b"\0" * 28))
    assert [(e.name, e.dtype, e.count, e.is_float) for e in found] == [
        ("b", "F16", 2, True),
        ("a", "F32", 2, True),
        ("empty", "F32", 0, True),
        ("ids", "I64", 2, False),
    ]


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 8]}}',
        b'{"a": 1, "a": 2}',
        b'{"a": {%b}, "a": {%b}}' % (FIELDS, FIELDS),
        b'{"a": {%b}, "\\u0061": {%b}}' % (FIELDS, FIELDS),
        b'{"a": {"dtype": "F16", %b}}' % FIELDS,
        b'{"a": {%b}, "__metadata__": {"x": "y", "x": "z"}}' % FIELDS,
        b'{"\xff": {%b}}' % FIELDS,
        b'{"\\ud800": {%b}}' % FIELDS,
        b'{"a": {%b, "more": %b1%b}}' % (FIELDS, b"[" * 100_000, b"]" * 100_000),
        [1],
        {"a": 1},
        {"a": {"dtype": "F32", "shape": [2]}},
        {"a": entry(dtype="F31")},
        {"a": entry(shape=[3])},
        {"a": entry(shape=[-2])},
        {"a": entry(shape=[2.0])},
        {"a": entry(shape=[True, 2])},
        {"a": entry(shape=[2**40, 2**40])},
        {"a": entry(shape=[0, 2**63])},
        {"a": entry(shape=[0, 10**30])},
        {"a": entry(shape=[0, 2**62, 2**62])},
        {"a": entry(shape=[1] * 9)},
        {"a": entry(0, 2**63)},
        {"a": {"dtype": "F32", "shape": [0], "data_offsets": [2**70, 2**70]}},
        {"a": entry(8, 0)},
        {"a": entry(-8, 0)},
        {"a": entry(4, 12)},
        {"a": entry(0, 4, shape=[1])},
        {"a": entry(), "b": entry()},
        {"a": entry(), "b": entry(16, 24)},
        {"a": entry(), "__metadata__": {"x": 1}},
        {"a": entry(), "__metadata__": []},
        {"a": entry(), "__metadata__": None},
        {"a": ["F32", [2], [0, 8]]},
        {"a": None},
        {"a": entry(shape=[1] * 200_000 + [2])},
        {"a": entry(0, 1, "F4")},
        {"a": entry(dtype="C64", shape=[1])},
        {"a": entry(dtype="x\n\x1b\u202e" * 100_000)},
        {"a\n\x1b": entry(shape=[3])},
        {},
    ],
    ids=lambda header: str(header)[:60],
)
def test_malformed_headers_are_refused_with_the_name_of_the_file(
    tmp_path: Path, header: object
) -> None:
    path = write(tmp_path / "bad.safetensors", header)
    with pytest.raises(ModelArtifactError, match=r"bad\.safetensors") as caught:
        read_header(path)
    assert str(caught.value).isprintable()
    assert str(caught.value).endswith(".")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("data", [b"", b"\0" * 7, b"\0" * 9], ids=len)
def test_data_of_another_length_are_refused(tmp_path: Path, data: bytes) -> None:
    path = write(tmp_path / "bad.safetensors", {"a": entry()}, data)
    with pytest.raises(ModelArtifactError, match="not fully covered"):
        read_header(path)


@pytest.mark.parametrize("digits", [10, 18, 4000])
@pytest.mark.parametrize("rank", [8, 20_000])
def test_no_number_of_a_header_is_computed_with_before_it_is_checked(
    tmp_path: Path, digits: int, rank: int
) -> None:
    """Multiplying a thousand numbers of 4,000 digits would take far too long."""
    shape = ",".join(["9" * digits] * min(rank, 4_000_000 // digits))
    header = f'{{"a": {{"dtype": "F32", "shape": [{shape}], "data_offsets": [0, 8]}}}}'
    with pytest.raises(ModelArtifactError, match=r"bad\.safetensors") as caught:
        read_header(write(tmp_path / "bad.safetensors", header.encode()))
    assert len(str(caught.value)) < 400


def test_shapes_up_to_the_caps_are_read(tmp_path: Path) -> None:
    header = {"a": entry(0, 0, shape=[0, 2**62]), "b": entry(0, 8, shape=[1, 1, 1, 1, 1, 1, 1, 2])}
    assert [e.count for e in read_header(write(tmp_path / "x.safetensors", header))] == [0, 2]


@pytest.mark.parametrize("size", [0, 3, 8, 20, 60])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, size: int) -> None:
    path = write(tmp_path / "x.safetensors", {"a": entry()})
    assert path.stat().st_size > size
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ModelArtifactError):
        read_header(path)


def test_a_huge_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", b" " * 1000)
    with pytest.raises(ModelArtifactError, match="claims 1000 bytes"):
        read_header(path, limits=Limits(max_safetensors_header_bytes=999))


def test_what_is_no_regular_file_is_refused_without_opening_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")  # opening it would block forever
    for path in (tmp_path, tmp_path / "pipe.safetensors", tmp_path / "missing"):
        with pytest.raises(ModelArtifactError, match="not a regular file"):
            read_header(path)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=200), length=st.integers(0, 300))
def test_random_bytes_are_read_or_refused_never_anything_else(
    tmp_path: Path, raw: bytes, length: int
) -> None:
    path = write(tmp_path / "x.safetensors", raw, b"", length)
    with contextlib.suppress(ModelArtifactError):
        read_header(path)
