"""Makes CLIP's tokenizer for a model that comes as one file, which holds none.

The table is OpenAI's (github.com/openai/CLIP, MIT licence). The package open_clip_torch carries it
(MIT licence, too); of the package nothing else is used, and it is never imported. The table is
taken by its hash, so any version that carries the same one will do. Standard library only.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Final

from dreambooth.errors import ResourceError
from dreambooth.model_folder import vocabulary
from dreambooth.model_folder.published_layout import Family
from dreambooth.model_folder.vocabulary import Vocabulary

_PACKAGE: Final = "open_clip_torch"
_FILE: Final = "open_clip/bpe_simple_vocab_16e6.txt.gz"
_SHA256: Final = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
# The table lists more merges than CLIP has tokens for: 49,408 less 512 bytes and 2 special tokens.
_MERGES: Final = 48_894
_START: Final = "<|startoftext|>"
_END: Final = "<|endoftext|>"
# Prompts are padded with the end token in 1.x, and with token 0 in 2.x.
_PADDING: Final[dict[Family, str]] = {"1.x": _END, "2.x": "!"}
_LENGTH: Final = 77


def read() -> Vocabulary:
    """Return CLIP's tokens and merges. Raises ResourceError where the package is not installed."""
    try:
        path = Path(str(importlib.metadata.distribution(_PACKAGE).locate_file(_FILE)))
        data = path.read_bytes()
    except (importlib.metadata.PackageNotFoundError, OSError):
        data = b""
    if hashlib.sha256(data).hexdigest() != _SHA256:
        raise ResourceError(
            "A single-file checkpoint holds no vocabulary, and CLIP's is not installed here: run "
            "`pip install --no-deps -r requirements/clip-vocabulary.txt` (1.4 MB of "
            f"{_PACKAGE} are used), or name a diffusers folder of the same family with --base."
        )
    lines = gzip.decompress(data).decode("utf-8").split("\n")[1 : 1 + _MERGES]
    merges = tuple((first, second) for first, second in (line.split() for line in lines))
    letters = _letters()
    tokens = (
        *letters,
        *(f"{letter}</w>" for letter in letters),
        *(first + second for first, second in merges),
        *(_START, _END),
    )
    return Vocabulary(ids={token: number for number, token in enumerate(tokens)}, merges=merges)


def write(folder: Path, family: Family) -> None:
    """Write the tokenizer of a family into an existing folder. Raises as `read` does."""
    vocabulary.write(folder, read())
    special = {
        "bos_token": _START,
        "eos_token": _END,
        "unk_token": _END,
        "pad_token": _PADDING[family],
    }
    settings = {**special, "model_max_length": _LENGTH, "tokenizer_class": "CLIPTokenizer"}
    for name, content in (
        ("special_tokens_map.json", special),
        ("tokenizer_config.json", settings | {"do_lower_case": True}),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _letters() -> list[str]:
    """Return the letter that stands for each byte, in the order of CLIP's ids.

    Printable characters of Latin-1 stand for themselves and come first; the other bytes get the
    characters from 256 on.
    """
    printable = (*range(33, 127), *range(161, 173), *range(174, 256))
    return [chr(code) for code in (*printable, *range(256, 512 - len(printable)))]
