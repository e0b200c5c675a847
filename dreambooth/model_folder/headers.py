"""Checks safetensors headers before anything reads the tensors; needs numpy, but no torch.

A file holds the header's length (8 bytes, little-endian), the header as JSON
`{"name": {"dtype": "F32", "shape": [..], "data_offsets": [begin, end]}, "__metadata__": {..}}`,
and then the tensors back to back. See https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError, safe_open

from dreambooth.errors import ModelArtifactError, in_one_line, quoted
from dreambooth.limits import LIMITS, Limits

# Bytes of a value. Stable Diffusion's weights are floats; only position_ids are integers. The
# format knows more.
DTYPES: Mapping[str, int] = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1},
    **{"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1},
}
# Sizes and counts of values must be smaller: libraries hold them as int64.
_TOO_LARGE = 2**63


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor as the header declares it. begin: where its bytes begin in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int

    @property
    def count(self) -> int:
        """Return how many values the tensor holds."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Return how many bytes the tensor takes."""
        return self.count * DTYPES[self.dtype]

    @property
    def is_float(self) -> bool:
        """Return whether these are weights, not position_ids or another table of integers."""
        return "F" in self.dtype


def read_header(path: Path, *, limits: Limits = LIMITS) -> tuple[TensorEntry, ...]:
    """Check the header of a safetensors file, and return its entries in the header's order.

    Raises ModelArtifactError as `read_with_metadata` does.
    """
    return read_with_metadata(path, limits=limits)[0]


def read_with_metadata(
    path: Path, *, limits: Limits = LIMITS
) -> tuple[tuple[TensorEntry, ...], dict[str, str]]:
    """Check the header of a safetensors file, and return its entries and its metadata.

    The library proves that the header is whole and that its tensors fill the rest of the file
    exactly. It accepts tensors of any rank, sizes that it cannot return, and names that stand
    twice, of which it reads one. Raises ModelArtifactError, naming the file, for these too.
    """
    if not path.is_file():
        _refuse(path, "it is not a regular file")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        most = limits.max_safetensors_header_bytes
        if length > most:
            _refuse(path, f"its header claims {length} bytes, and at most {most} are read")
        raw = file.read(length)
    try:
        with safe_open(path, framework="np"):
            pass
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (SafetensorError, TypeError, OverflowError, ValueError, RecursionError) as error:
        _refuse(path, in_one_line(error), error)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        _refuse(path, "its metadata is not a table")
    if len(header) > limits.max_tensors:
        _refuse(path, f"it holds {len(header)} tensors, and at most {limits.max_tensors} are read")
    start = 8 + length
    entries = tuple(_entry(path, name, fields, start, limits) for name, fields in header.items())
    return entries, {key: text for key, text in metadata.items() if isinstance(text, str)}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name stands twice in its header")
    return table


def _entry(path: Path, name: str, fields: object, start: int, limits: Limits) -> TensorEntry:
    match fields:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int()]}:
            pass
        case _:  # the library reads lists, ["F32", [2], [0, 8]], as well
            _refuse(path, f"the entry {quoted(name)} of its header is malformed")
    if dtype not in DTYPES:
        _refuse(path, f"{quoted(name)} has the dtype {quoted(dtype)}, which is not read here")
    if len(shape) > limits.max_tensor_rank:
        _refuse(path, f"{quoted(name)} has {len(shape)} dimensions")
    # Zeros are left out: libraries multiply the other sizes for the strides.
    if math.prod(size for size in shape if size) >= _TOO_LARGE:
        _refuse(path, f"{quoted(name)} has a shape too large for any library")
    return TensorEntry(name=name, dtype=dtype, shape=tuple(shape), begin=start + begin)


def _refuse(path: Path, why: str, cause: Exception | None = None) -> NoReturn:
    raise ModelArtifactError(f"{path} is not a valid safetensors file: {why}.") from cause
