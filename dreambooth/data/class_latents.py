"""Save the latents that a sampled class image was decoded from, so that it is not encoded again.

Each picture has one safetensors file, in a folder beside the pictures. The file holds the hash of
the picture's bytes and its origin, so that the latents of another picture, model or seed are not
used. This module needs no torch.
Legend: C latent channels, h w latent cells.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from dreambooth.data.picture_files import printable

log = logging.getLogger(__name__)

Latents = npt.NDArray[np.float32]

FOLDER = "latents"
"""Beside the pictures: their own folder then holds nothing but pictures."""

_TENSOR = "latents"
_HEADER_BYTES = 4096  # generous: a length, one tensor and two texts


def place_of(picture: Path) -> Path:
    """Return the path of the file with a picture's latents."""
    return picture.parent / FOLDER / f"{picture.stem}.safetensors"


def content(latents: Latents, *, picture: bytes, origin: str) -> bytes:
    """Return the bytes of one file. latents: float32 [C,h,w]. picture: bytes of the whole PNG."""
    written: bytes = save(
        {_TENSOR: np.ascontiguousarray(latents, dtype=np.float32)},
        metadata={"picture": hashlib.sha256(picture).hexdigest(), "origin": origin},
    )
    # safetensors writes the two names in any order; here equal latents give equal bytes.
    end = 8 + int.from_bytes(written[:8], "little")
    header = json.dumps(json.loads(written[8:end]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + written[end:]


def read(picture: Path, *, origin: str, shape: tuple[int, int, int]) -> Latents | None:
    """Return the latents float32 [C,h,w] of a picture, as they were given to `content`.

    Returns None if there are none, and (with a warning) if the file is damaged, of another shape or
    not finite, or belongs to another picture or origin.
    """
    path = place_of(picture)
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait
            raise ValueError("it is no regular file")
        size = path.stat().st_size
        if size > 4 * int(np.prod(shape)) + _HEADER_BYTES:
            raise ValueError(f"it has {size} bytes")
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            latents = file.get_tensor(_TENSOR)
        if metadata.get("origin") != origin:
            raise ValueError("it is of another model, prompt or seed")
        if metadata.get("picture") != hashlib.sha256(picture.read_bytes()).hexdigest():
            raise ValueError("the picture is not the one that it was written for")
        if latents.shape != shape or latents.dtype != np.float32:
            raise ValueError(f"it holds {latents.dtype} {latents.shape}")
        if not np.isfinite(latents).all():
            raise ValueError("it is not finite")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, OverflowError, SafetensorError) as error:
        name = os.path.join(FOLDER, path.name)
        log.warning(
            "%s is not used, and its class image encoded instead: %s",
            printable(name),
            printable(str(error)),
        )
        return None
    return np.asarray(latents)
