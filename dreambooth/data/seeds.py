"""Derive seeds from a base seed and keys, the same on every machine."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *keys: str | int) -> int:
    """Return a 63-bit seed (BLAKE2b of seed and keys); similar keys give unrelated seeds."""
    text = "\0".join(str(part) for part in (seed, *keys))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1
