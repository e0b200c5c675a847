from __future__ import annotations

import struct

import pytest

from dreambooth.model_folder import sentencepiece_model

SCORE = struct.pack("<f", -1.5)
PIECE = b"\x0a\x0b" + b"\x0a\x04\xe2\x96\x81a" + b"\x15" + SCORE
TRAINER = b"\x12\x02\x18\x01"
NORMALIZER = b"\x1a\x04\x12\x02\x01\x02"


def test_pieces_and_the_table_of_replacements_are_read() -> None:
    model = sentencepiece_model.parse(PIECE + TRAINER + PIECE + NORMALIZER)
    assert model.pieces == (("▁a", -1.5),) * 2
    assert model.charsmap == b"\x01\x02"
    assert sentencepiece_model.parse(b"").pieces == ()


def test_fields_of_other_kinds_are_passed_over() -> None:
    others = b"\x20\x80\x01" + b"\x29" + b"12345678" + b"\x2d" + b"1234"
    assert sentencepiece_model.parse(others + PIECE).pieces == (("▁a", -1.5),)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (PIECE[:-1], "cut off"),
        (b"\x0a", "cut off"),
        (b"\x80" * 20, "cut off"),
        (b"\x0b", "no field of the type 3"),
        (b"\x12\x02\x18\x02", "unigram"),
        (b"\x0a\x05\x15" + SCORE, "the piece ''"),
        (PIECE.replace(SCORE, struct.pack("<f", float("inf"))), "score inf"),
        (PIECE.replace(b"\xe2\x96\x81", b"\xff\xff\xff"), "utf-8"),
    ],
)
def test_what_is_no_such_file_is_reported(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        sentencepiece_model.parse(data)
