"""Write the embedded model's own CLIP vocabulary, with one token for each word of the drawn world.

It has 256 byte characters, each alone and as the end of a word, then one entry per merge, then the
begin and end tokens. So any string can be tokenised without an unknown token, and a rare word is
split into its letters.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
MAX_LENGTH = 32
WORD_END = "</w>"


def byte_characters() -> list[str]:
    """Return the table of GPT-2 and CLIP: one printable character for each of the 256 bytes.

    They are in the order of those vocabularies, which is not that of the bytes.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]


def _apply(pieces: list[str], merges: Sequence[tuple[str, str]]) -> list[str]:
    """Byte-pair encode one word: always apply the earliest merge that fits, everywhere at once."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    while len(pieces) > 1:
        pairs = list(pairwise(pieces))
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        merged: list[str] = []
        for piece in pieces:
            if merged and (merged[-1], piece) == best:
                merged[-1] += piece
            else:
                merged.append(piece)
        pieces = merged
    return pieces


def learn_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Return merges that make each (ASCII, lower-case) word one token.

    Later words never split earlier ones.
    """
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = _apply([*word[:-1], word[-1] + WORD_END], merges)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = _apply(pieces, merges)
    return merges


def write(folder: Path, words: Sequence[str]) -> None:
    """Write the four files that CLIPTokenizer of transformers 4 and 5 reads."""
    folder.mkdir(parents=True, exist_ok=True)
    characters = byte_characters()
    merges = learn_merges(words)
    entries = [
        *characters,
        *(character + WORD_END for character in characters),
        *("".join(merge) for merge in merges),
        BEGIN,
        END,
    ]
    vocabulary = {entry: index for index, entry in enumerate(dict.fromkeys(entries))}
    special = {
        "bos_token": BEGIN,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
    }
    configuration = {
        **special,
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_LENGTH,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
    }
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, content in (
        ("vocab.json", vocabulary),
        ("special_tokens_map.json", special),
        ("tokenizer_config.json", configuration),
    ):
        text = json.dumps(content, ensure_ascii=False, indent=None if name == "vocab.json" else 2)
        (folder / name).write_text(text + "\n", encoding="utf-8")
