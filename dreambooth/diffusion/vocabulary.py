"""The two tables of a CLIP tokenizer, checked before a library reads them (standard library only).

Published folders hold vocab.json and merges.txt; transformers 5 writes both into tokenizer.json
alone, which the tokenizer class of transformers 4.x cannot read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from dreambooth.diffusion.layout import read_json
from dreambooth.errors import ModelArtifactError
from dreambooth.limits import LIMITS, Limits


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Token ids by token, and the byte-pair merges in the order of their rank."""

    ids: dict[str, int]
    merges: tuple[tuple[str, str], ...]


def read(folder: Path, *, limits: Limits = LIMITS) -> Vocabulary:
    """Read the tables of a tokenizer folder, in either layout.

    Raises ModelArtifactError, naming the file, where a table is missing or does not fit together.
    """
    for path in sorted(folder.glob("*.json")):
        if read_json(path, limits=limits).get("auto_map"):
            raise ModelArtifactError(f"{path} asks for code of its own, which is never run.")
    single = folder / "tokenizer.json"
    if single.is_file():
        # Where both layouts are there, the library reads this one.
        model = read_json(single, limits=limits).get("model")
        model = model if isinstance(model, dict) else {}
        return _checked(single, model.get("vocab"), model.get("merges"))
    ids, lines = folder / "vocab.json", folder / "merges.txt"
    table = read_json(ids, limits=limits)
    try:
        if lines.stat().st_size > limits.max_config_bytes:
            raise ModelArtifactError(f"{lines} is larger than {limits.max_config_bytes} bytes.")
        text = lines.read_bytes().decode("utf-8")
    except (OSError, UnicodeError) as error:
        raise ModelArtifactError(f"{lines} cannot be read: {error}.") from error
    rows = [line for line in text.split("\n") if line.strip() and not line.startswith("#version")]
    return _checked(lines, table, rows)


def write(folder: Path, vocabulary: Vocabulary) -> None:
    """Write vocab.json and merges.txt, as every version of transformers reads them."""
    text = json.dumps(vocabulary.ids, ensure_ascii=False)
    (folder / "vocab.json").write_text(text, encoding="utf-8")
    rows = ["#version: 0.2", *(" ".join(pair) for pair in vocabulary.merges)]
    (folder / "merges.txt").write_text("\n".join(rows) + "\n", encoding="utf-8")


def _checked(path: Path, ids: object, merges: object) -> Vocabulary:
    if not isinstance(ids, dict) or not isinstance(merges, list):
        raise ModelArtifactError(f"{path} holds no table of tokens and merges.")
    if any(type(number) is not int or number < 0 for number in ids.values()):
        raise ModelArtifactError(f"{path}: the vocabulary must give a number to each token.")
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
                    f"{path}: the merge {str(merge)[:100]!r} does not fit the vocabulary."
                )
    return Vocabulary(ids=ids, merges=tuple(pairs))
