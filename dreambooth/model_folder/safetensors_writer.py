"""Writes a safetensors file tensor by tensor, so that a model may be larger than the memory.

The same tensors and metadata always give the same bytes, which the library's own writer does not
promise: it writes the metadata in any order. Standard library only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dreambooth.errors import ModelArtifactError, quoted
from dreambooth.limits import MIB
from dreambooth.model_folder.headers import TensorEntry

# The library aligns the header so, and the tensors by size of their numbers.
_ALIGNMENT: Final = 8
_BLOCK_BYTES: Final = 4 * MIB
_NO_HASH: Final = "0x" + "0" * 64


@dataclass(frozen=True, slots=True, kw_only=True)
class NewTensor:
    """A tensor to write. content: returns its bytes in pieces; None leaves a hole in the file."""

    entry: TensorEntry
    content: Callable[[], Iterable[bytes | memoryview]] | None


def write(
    path: Path,
    tensors: Iterable[NewTensor],
    metadata: Mapping[str, str],
    *,
    hash_key: str | None = None,
) -> None:
    """Write a new file; where tensors are begins is chosen here.

    hash_key: the key of the metadata that gets the SHA-256 of all tensors, as 0x and hex digits.
    Raises OSError, and ModelArtifactError where a tensor's bytes are not as many as its shape says.
    """
    ordered = sorted(tensors, key=lambda tensor: (-_bytes_each(tensor.entry), tensor.entry.name))
    stated = dict(metadata) | ({hash_key: _NO_HASH} if hash_key else {})
    header: dict[str, object] = {"__metadata__": stated}
    end = 0
    for tensor in ordered:
        entry, begin = tensor.entry, end
        end += entry.size
        fields = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [begin, end]}
        header[entry.name] = fields
    digest = hashlib.sha256()
    with path.open("wb") as file:
        file.write(_packed(header))
        start = file.tell()
        for tensor in ordered:
            if tensor.content is None:
                file.seek(tensor.entry.size, 1)
                continue
            written = 0
            for piece in tensor.content():
                written += file.write(piece)
                if hash_key:
                    digest.update(piece)
            if written != tensor.entry.size:
                raise ModelArtifactError(
                    f"{quoted(tensor.entry.name)} has {written} bytes, and {tensor.entry.size} "
                    "were expected: the file that it is read from has changed."
                )
        file.truncate(start + end)
        if hash_key:
            stated[hash_key] = f"0x{digest.hexdigest()}"
            file.seek(0)
            file.write(_packed(header))


def _packed(header: Mapping[str, object]) -> bytes:
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _bytes_each(entry: TensorEntry) -> int:
    return entry.size // entry.count if entry.count else 0


def slice_of(path: Path, begin: int, size: int) -> Callable[[], Iterator[bytes]]:
    """Return a function that reads `size` bytes of a file in pieces, from `begin` on."""

    def read() -> Iterator[bytes]:
        left = size
        with path.open("rb") as file:
            file.seek(begin)
            while left and (piece := file.read(min(left, _BLOCK_BYTES))):
                left -= len(piece)
                yield piece

    return read
