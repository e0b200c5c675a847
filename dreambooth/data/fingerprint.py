"""Compute short hashes that show whether data or weights are the same as in an earlier run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from dreambooth.data.dataset_info import DatasetInfo

_BLOCK_BYTES = 1 << 16
_STRIDE_BYTES = 1 << 24


def of_dataset(dataset: DatasetInfo) -> str:
    """Hash prompts and captions, and the names and hashes of all pictures, into 16 hex digits."""
    digest = hashlib.sha256()
    sha256 = dataset.sha256
    for subject in dataset.subjects:
        for text in (subject.instance_prompt, subject.class_prompt or ""):
            digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
        for path in subject.instance_images:
            name = subject.name_of(path)
            digest.update(name.encode("utf-8", "surrogateescape") + b"\0" + sha256[path])
        for prompt in subject.prompts if subject.captions else ():
            digest.update(prompt.encode() + b"\0")
        for number, facts in enumerate(subject.mask_facts):
            if facts is not None:
                digest.update(f"mask {number}".encode() + b"\0" + facts.sha256)
    for given in dataset.class_sets:
        if dataset.are_several:
            digest.update(given.class_prompt.encode("utf-8", "surrogatepass") + b"\0")
        for path in given.images:
            digest.update(path.name.encode("utf-8", "surrogateescape") + b"\0" + sha256[path])
    return digest.hexdigest()[:16]


def of_texts(*parts: str) -> str:
    """Hash texts, in their order, into 16 hex digits."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8) + data)  # ("ab", "c") is not ("a", "bc")
    return digest.hexdigest()[:16]


def of_weights(files: Iterable[Path]) -> str:
    """Hash weight files by name, size and a 64 KiB block of every 16 MiB, into 16 hex digits.

    Training changes every tensor, so blocks tell two models apart without reading gigabytes.
    """
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.parent.name}/{path.name}:{size}\0".encode())
        with path.open("rb") as file:
            for offset in range(0, size, _STRIDE_BYTES):
                file.seek(offset)
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()[:16]
