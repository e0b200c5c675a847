"""Reads, checks and writes the tables of tokenizers (standard library only).

They are checked before a library reads them. Published folders hold vocab.json and merges.txt
(CLIP), vocab.txt (BERT) or sentencepiece.bpe.model (XLM-RoBERTa). transformers 5 writes only
tokenizer.json instead, which the tokenizer classes of transformers 4.x cannot read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth.errors import ModelArtifactError, quoted
from dreambooth.limits import LIMITS, Limits
from dreambooth.model_folder import sentencepiece_model
from dreambooth.model_folder.layout import read_json
from dreambooth.model_folder.mistaken_files import refuse_pointer
from dreambooth.model_folder.sentencepiece_model import SentencePieceModel

# One file for every family; where it exists, the library reads it instead of the others.
SINGLE = "tokenizer.json"
WORDPIECE = "vocab.txt"
SENTENCEPIECE = "sentencepiece.bpe.model"
# Scores are log probabilities: about -20 to 0.
_MAX_SCORE = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Token ids by token, and the byte-pair merges in the order of their rank."""

    ids: dict[str, int]
    merges: tuple[tuple[str, str], ...]


def read(folder: Path, *, limits: Limits = LIMITS) -> Vocabulary:
    """Read the tables of a CLIP tokenizer's folder, in either layout.

    Raises ModelArtifactError, naming the file, where a table is missing or malformed, or the tables
    do not fit together.
    """
    model = _single_file(folder, limits)
    if model is not None:
        return _checked(folder / SINGLE, model.get("vocab"), model.get("merges"))
    ids, lines = folder / "vocab.json", folder / "merges.txt"
    table = read_json(ids, limits=limits)
    text = _text(lines, limits)
    rows = [line for line in text.split("\n") if line.strip() and not line.startswith("#version")]
    return _checked(lines, table, rows)


def read_wordpiece(folder: Path, *, limits: Limits = LIMITS) -> dict[str, int]:
    """Read the token ids of a BERT tokenizer's folder, in either layout. Raises as `read` does."""
    model = _single_file(folder, limits)
    if model is not None:
        return _numbered(folder / SINGLE, model.get("vocab"))
    path = folder / WORDPIECE
    lines = _text(path, limits).removesuffix("\n").split("\n")
    return _numbered(path, {line.removesuffix("\r"): n for n, line in enumerate(lines) if line})


def read_unigram(folder: Path, *, limits: Limits = LIMITS) -> SentencePieceModel:
    """Read an XLM-RoBERTa tokenizer's pieces, in the order of its text encoder's ids.

    charsmap is left empty where the folder holds a tokenizer.json. Raises as `read` does.
    """
    model = _single_file(folder, limits)
    if model is not None:
        return SentencePieceModel(pieces=_scored(folder, model.get("vocab")), charsmap=b"")
    path = folder / SENTENCEPIECE
    try:
        found = sentencepiece_model.parse(_bytes(path, limits))
    except ValueError as error:
        raise ModelArtifactError(f"{path} is no SentencePiece model: {error}.") from error
    if [piece for piece, _ in found.pieces[:3]] != ["<unk>", "<s>", "</s>"]:
        raise ModelArtifactError(f"{path} does not begin with XLM-RoBERTa's special tokens.")
    # fairseq numbered the special tokens in this order when XLM-RoBERTa was trained.
    first = (("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0))
    pieces = (*first, *found.pieces[3:], ("<mask>", 0.0))
    return SentencePieceModel(pieces=pieces, charsmap=found.charsmap)


def write(folder: Path, vocabulary: Vocabulary) -> None:
    """Write vocab.json and merges.txt, which every version of transformers reads."""
    text = json.dumps(vocabulary.ids, ensure_ascii=False)
    (folder / "vocab.json").write_text(text, encoding="utf-8")
    rows = ["#version: 0.2", *(" ".join(pair) for pair in vocabulary.merges)]
    (folder / "merges.txt").write_text("\n".join(rows) + "\n", encoding="utf-8")


def write_wordpiece(folder: Path, ids: dict[str, int]) -> None:
    """Write vocab.txt, one token per line; a token's id is its line, counted from 0."""
    rows = [""] * (max(ids.values()) + 1)
    for token, number in ids.items():
        rows[number] = token
    (folder / WORDPIECE).write_text("\n".join(rows) + "\n", encoding="utf-8")


def _single_file(folder: Path, limits: Limits) -> dict[str, Any] | None:
    """Return the `model` of tokenizer.json, which takes precedence; None without that file.

    Raises ModelArtifactError where any JSON file of the folder asks for code.
    """
    for path in sorted(folder.glob("*.json")):
        if read_json(path, limits=limits).get("auto_map"):
            raise ModelArtifactError(f"{path} asks for code of its own, which is never run.")
    if not (folder / SINGLE).is_file():
        return None
    model = read_json(folder / SINGLE, limits=limits).get("model")
    return model if isinstance(model, dict) else {}


def _text(path: Path, limits: Limits) -> str:
    try:
        return _bytes(path, limits).decode("utf-8")
    except UnicodeError as error:
        raise ModelArtifactError(f"{path} cannot be read: {error}.") from error


def _bytes(path: Path, limits: Limits) -> bytes:
    try:
        if path.exists() and not path.is_file():  # opening a pipe would block
            raise ModelArtifactError(f"{path} is no regular file.")
        if path.stat().st_size > limits.max_config_bytes:
            raise ModelArtifactError(f"{path} is larger than {limits.max_config_bytes} bytes.")
        data = path.read_bytes()
        refuse_pointer(path, data)
        return data
    except OSError as error:
        raise ModelArtifactError(f"{path} cannot be read: {error}.") from error


def _numbered(path: Path, ids: object) -> dict[str, int]:
    if not isinstance(ids, dict) or not ids:
        raise ModelArtifactError(f"{path} holds no table of tokens.")
    if any(type(number) is not int or number < 0 for number in ids.values()):
        raise ModelArtifactError(f"{path}: the vocabulary must give a number to each token.")
    return ids


def _scored(folder: Path, rows: object) -> tuple[tuple[str, float], ...]:
    pieces = []
    for row in rows if isinstance(rows, list) else []:
        match row:
            case [str(piece), (float() | int()) as score] if -_MAX_SCORE < score < _MAX_SCORE:
                pieces.append((piece, float(score)))
            case _:
                raise ModelArtifactError(
                    f"{folder / SINGLE}: the piece {quoted(row)} is not a text with a score."
                )
    if [piece for piece, _ in pieces[:4]] != ["<s>", "<pad>", "</s>", "<unk>"]:
        raise ModelArtifactError(f"{folder / SINGLE} holds no table of XLM-RoBERTa's pieces.")
    return tuple(pieces)


def _checked(path: Path, ids: object, merges: object) -> Vocabulary:
    if not isinstance(ids, dict) or not isinstance(merges, list):
        raise ModelArtifactError(f"{path} holds no table of tokens and merges.")
    ids = _numbered(path, ids)
    pairs = []
    for merge in merges:
        pair = merge.split() if isinstance(merge, str) else merge
        match pair:
            case [str(first), str(second)] if (
                first in ids and second in ids and first + second in ids
            ):
                pairs.append((first, second))
            case _:
                raise ModelArtifactError(
                    f"{path}: the merge {quoted(merge)} does not fit the vocabulary."
                )
    return Vocabulary(ids=ids, merges=tuple(pairs))
