"""Checks safetensors headers before any library maps the file (standard library only).

A file holds the header's length (8 bytes, little-endian), the header as JSON
`{"name": {"dtype": "F32", "shape": [..], "data_offsets": [begin, end]}, "__metadata__": {..}}`,
and then the tensors back to back. See https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from dreambooth.errors import ModelArtifactError, quoted
from dreambooth.limits import LIMITS, Limits

# Bytes per value. Stable Diffusion's weights are floats; only position_ids are integers.
DTYPE_BYTES = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1},
    **{"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1},
}


# Sizes, offsets and counts of values must be smaller: libraries hold them as int64.
_TOO_LARGE = 2**63
_MOST_DIGITS = 19


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor as the header declares it; `bytes` is its size in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def count(self) -> int:
        """Return how many values the tensor holds."""
        return math.prod(self.shape)

    @property
    def is_float(self) -> bool:
        """Return whether these are weights, not position_ids or another table of integers."""
        return "F" in self.dtype


def int_of_at_most(digits: int) -> Callable[[str], int]:
    """Return a parser for the whole numbers of JSON that raises ValueError for longer ones.

    They are refused before anything is computed with them, which could take very long.
    """

    def read(text: str) -> int:
        if len(text) > digits:
            raise ValueError(f"a number has {len(text)} digits")
        return int(text)

    return read


def read_header(path: Path, *, limits: Limits = LIMITS) -> tuple[TensorEntry, ...]:
    """Read and check the header of a safetensors file; return its entries in the order of the data.

    Raises ModelArtifactError, naming the file, unless the header is complete, its tensors fill the
    rest of the file exactly (no hole, no overlap, nothing after them) and every dtype is known.
    """
    if not path.is_file():
        _refuse(path, "it is not a regular file")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 10 or length > size - 8:
            _refuse(path, "it is cut off before the end of its header")
        if length > limits.max_safetensors_header_bytes:
            _refuse(path, f"its header claims {length} bytes")
        raw = file.read(length)
    header = _parse(path, raw)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(not isinstance(v, str) for v in metadata.values()):
        _refuse(path, "its metadata is not a table of strings")
    entries = [_entry(path, name, fields, limits) for name, fields in header.items()]
    entries.sort(key=lambda found: (found[0], found[1], found[2].name))
    position = 0
    for begin, end, entry in entries:
        if begin != position:
            _refuse(path, f"the data of {quoted(entry.name)} overlap others or leave a hole")
        position = end
    if position != size - 8 - length:
        _refuse(path, f"its tensors need {position} bytes, and {size - 8 - length} are there")
    return tuple(entry for _, _, entry in entries)


def _parse(path: Path, raw: bytes) -> dict[str, object]:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError("a name stands twice")
        return table

    number = int_of_at_most(_MOST_DIGITS)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_int=number)
    except (ValueError, RecursionError) as error:
        raise ModelArtifactError(
            f"{path} is not a safetensors file: its header is not JSON ({error})."
        ) from error
    if not isinstance(header, dict):
        _refuse(path, "its header is not a JSON object")
    return header


def _entry(path: Path, name: str, fields: object, limits: Limits) -> tuple[int, int, TensorEntry]:
    match fields:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]} if (
            len(shape) <= limits.max_tensor_rank
            and all(type(n) is int and 0 <= n < _TOO_LARGE for n in (*shape, begin, end))
            # Zeros are left out: libraries multiply the other sizes for the strides.
            and math.prod(n for n in shape if n) < _TOO_LARGE
        ):
            pass
        case _:
            _refuse(path, f"the entry {quoted(name)} of its header is malformed")
    if dtype not in DTYPE_BYTES:
        _refuse(path, f"{quoted(name)} has the unknown dtype {quoted(dtype)}")
    if end - begin != math.prod(shape) * DTYPE_BYTES[dtype]:
        _refuse(path, f"{quoted(name)} has a shape that does not fit its bytes")
    return begin, end, TensorEntry(name=name, dtype=dtype, shape=tuple(shape), bytes=end - begin)


def _refuse(path: Path, why: str) -> NoReturn:
    raise ModelArtifactError(f"{path} is not a valid safetensors file: {why}.")
