"""Reads the pieces of a `sentencepiece.bpe.model` file (standard library only).

The file is a protocol buffer (sentencepiece_model.proto of the SentencePiece project). Field 1 of
its message repeats the pieces (1 text, 2 score), field 2 describes the training (3 kind of model),
and field 3 the normalization (2 its table). Reading these inner fields needs no library and runs no
code.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from dreambooth.errors import quoted

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE_TEXT, _PIECE_SCORE, _MODEL_TYPE, _CHARSMAP = 1, 2, 3, 2
_UNIGRAM = 1
_MAX_VARINT_BYTES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class SentencePieceModel:
    """The pieces of a model with their log probabilities, in the order of their ids.

    charsmap: the compiled table of replacements made in a text first; empty where there are none.
    """

    pieces: tuple[tuple[str, float], ...]
    charsmap: bytes


def parse(data: bytes) -> SentencePieceModel:
    """Read a unigram model. Raises ValueError, with the reason, for anything else."""
    pieces: list[tuple[str, float]] = []
    charsmap = b""
    for number, value in _fields(data):
        if not isinstance(value, bytes):
            continue
        if number == _PIECES:
            pieces.append(_piece(value))
        elif number == _TRAINER:
            kinds = [kind for field, kind in _fields(value) if field == _MODEL_TYPE]
            if kinds and kinds[-1] != _UNIGRAM:
                raise ValueError("its model is not of the unigram kind")
        elif number == _NORMALIZER:
            for field, table in _fields(value):
                if field == _CHARSMAP and isinstance(table, bytes):
                    charsmap = table
    return SentencePieceModel(pieces=tuple(pieces), charsmap=charsmap)


def _piece(data: bytes) -> tuple[str, float]:
    text, score = "", 0.0
    for number, value in _fields(data):
        if number == _PIECE_TEXT and isinstance(value, bytes):
            text = value.decode("utf-8")
        elif number == _PIECE_SCORE and isinstance(value, bytes) and len(value) == 4:
            (score,) = struct.unpack("<f", value)
    if not text or not math.isfinite(score):
        raise ValueError(f"the piece {quoted(text)} has the score {score}")
    return text, score


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (field number, value) of each field; fixed-width numbers stay bytes."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        kind = key & 7
        if kind == 0:
            number, position = _varint(data, position)
            yield key >> 3, number
            continue
        if kind == 2:
            size, position = _varint(data, position)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"there is no field of the type {kind}")
        if position + size > len(data):
            raise ValueError("it is cut off")
        yield key >> 3, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Read a number of seven bits per byte, lowest first; return it and the next position."""
    value = 0
    for index, byte in enumerate(data[position : position + _MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, position + index + 1
    raise ValueError("it is cut off")
