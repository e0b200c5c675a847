"""Recognizes files that are taken for a model or its weights and are none (standard library only).

Among them are git-lfs pointers, error messages that a failed download has saved, and weights that
are not those of a whole model in the diffusers layout.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Final

from dreambooth.errors import ModelArtifactError, quoted
from dreambooth.limits import LIMITS, Limits

_START_BYTES: Final = 512
_POINTERS: Final = (b"version https://git-lfs.github.com/", b"version https://hawser.github.com/")
_OTHER_ARCHIVES: Final = {
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!": "rar",
}
# What comes before the first words of an XML or HTML page.
_PREAMBLE: Final = re.compile(r"\A(\s|<\?[^>]*>|<![^>]*>)+")
_SINGLE_FILES: Final = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
# Of tensors in the files of LoRA and its relatives, and of such files.
_LORA: Final = re.compile(r"(?:^|[._-])(?:lora|dora|hada|lokr|oft)(?:[._-]|$)", re.IGNORECASE)
_LORA_FILE: Final = re.compile(r"lora|lycoris|adapter_model", re.IGNORECASE)
# The U-Net in single-file checkpoints of Stable Diffusion.
_CHECKPOINT_UNET: Final = "model.diffusion_model."
_CONVERT: Final = "`python -m dreambooth convert FILE FOLDER` makes one of it"


def refuse_pointer(path: Path, start: bytes) -> None:
    """Raise ModelArtifactError for a file that begins as a git-lfs pointer does."""
    if start.startswith(_POINTERS):
        raise ModelArtifactError(
            f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` where the model "
            "was cloned, and copy it again."
        )


def refuse_stand_in(path: Path, wanted: str) -> None:
    """Raise ModelArtifactError for what a failed download leaves in place of a binary file.

    wanted: what the file should be, such as "a tar archive". A file that cannot be opened is left
    to its reader.
    """
    start = _start_of(path)
    refuse_pointer(path, start)
    text = start.decode("utf-8", "ignore")
    if text and all(c.isprintable() or c.isspace() for c in text) and len(text) > len(start) // 2:
        said = _PREAMBLE.sub("", text).strip() or text.strip()
        raise ModelArtifactError(
            f"{path} is not {wanted} but text that begins with {quoted(said)}, perhaps the message "
            "of a download that failed: fetch the file again."
        )


def _start_of(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_START_BYTES)
    except OSError:
        return b""


def refuse_other_archive(path: Path) -> None:
    """Raise ModelArtifactError for text and for an archive of another kind than tar and tar.gz."""
    refuse_stand_in(path, "a tar archive")
    start = _start_of(path)
    for magic, kind in _OTHER_ARCHIVES.items():
        if start.startswith(magic):
            raise ModelArtifactError(
                f"{path} is not a tar archive (.tar or .tar.gz) but {kind}: pack the folder with "
                "`tar -czf`."
            )


def refuse_single_file(path: Path, *, limits: Limits = LIMITS) -> None:
    """Raise ModelArtifactError for weights in one file; it says what they are and what to do."""
    fault = single_file_fault(path, limits=limits)
    if fault is not None:
        refuse_stand_in(path, "a weight file")
        raise ModelArtifactError(f"{path} {fault}")


def single_file_fault(path: Path, *, limits: Limits = LIMITS) -> str | None:
    """Return the end of a sentence: what a file of weights is and what to do; None for others."""
    if path.suffix.lower() not in _SINGLE_FILES or not path.is_file():
        return None
    names = _tensor_names(path, limits)
    if any(map(_LORA.search, names)) or (not names and _LORA_FILE.search(path.stem)):
        return (
            "is a LoRA, which changes a model but is none: fuse it into its base model once with "
            "diffusers, pipeline.load_lora_weights(FILE), pipeline.fuse_lora(), "
            "pipeline.unload_lora_weights(), pipeline.save_pretrained(FOLDER), and give the folder."
        )
    if names and not any(name.startswith(_CHECKPOINT_UNET) for name in names):
        return (
            f"holds weights, such as {quoted(min(names))}, but not those of a whole Stable "
            "Diffusion model: give the diffusers folder that they belong to."
        )
    if names:
        return f"is a single-file checkpoint, and a diffusers folder is needed here: {_CONVERT}."
    if path.suffix.lower() == ".safetensors":
        return "is not a valid safetensors file: its header cannot be read; fetch the file again."
    return (
        "is a pickle, which is opened only to be converted, and only if it holds nothing but "
        f"weights: {_CONVERT}, or give the model as safetensors."
    )


def is_checkpoint(path: Path, *, limits: Limits = LIMITS) -> bool:
    """Return whether a file is a safetensors file with the U-Net of a single-file checkpoint."""
    names = _tensor_names(path, limits) if path.is_file() else []
    return any(name.startswith(_CHECKPOINT_UNET) for name in names) and not any(
        map(_LORA.search, names)
    )


def _tensor_names(path: Path, limits: Limits) -> list[str]:
    """Return the names in a safetensors header; none of a file that has no readable one."""
    if path.suffix.lower() != ".safetensors":
        return []
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > limits.max_safetensors_header_bytes:
                return []
            header = json.loads(file.read(length))
    except (OSError, ValueError, RecursionError):
        return []
    return [name for name in header if name != "__metadata__"] if isinstance(header, dict) else []
