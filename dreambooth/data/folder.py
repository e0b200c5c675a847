"""Find the pictures of one folder that decode, and describe briefly what else it holds."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from dreambooth.data import masks
from dreambooth.data.images import ImageFacts, check_images
from dreambooth.data.picture_files import (
    NotAPictureError,
    PictureError,
    listed,
    printable,
    why,
)
from dreambooth.data.prompts import INFO_NAME
from dreambooth.errors import DatasetError
from dreambooth.limits import LIMITS, Limits

_JUNK = frozenset({"thumbs.db", "desktop.ini", "__macosx"})
# A file with such a suffix is meant to be a picture; if it holds none, it is a damaged one.
_PICTURE_SUFFIXES = frozenset(
    {".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".bmp", ".dib"}
    | {".gif", ".tif", ".tiff", ".avif"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """The entries of one folder by kind; `unusable` and `others` hold texts for messages.

    masks, mask_facts: of each picture, None for one that has none beside it; empty if none has.
    """

    paths: tuple[Path, ...]
    facts: tuple[ImageFacts, ...]
    unusable: tuple[str, ...]
    others: tuple[str, ...]
    masks: tuple[Path | None, ...] = ()
    mask_facts: tuple[ImageFacts | None, ...] = ()


def read_pictures(
    folder: Path, *, ignored: Collection[str] = (), most: int, limits: Limits = LIMITS
) -> Pictures:
    """Sort the entries of a folder by their first bytes, and check that the pictures decode.

    `ignored` names sub-folders (such as the class images') that are not mentioned. Raises
    DatasetError for a folder that cannot be listed, or that holds more than `most` pictures or too
    many entries.
    """
    files: list[Path] = []
    others: list[str] = []
    for entry in _entries(folder, limits):
        if entry.name == INFO_NAME or (entry.name in ignored and _is_folder(entry)):
            continue
        if entry.name.startswith(".") or entry.name.lower() in _JUNK or _is_folder(entry):
            others.append(printable(entry.name) + ("/" if _is_folder(entry) else ""))
        else:
            files.append(Path(entry.path))
    _refuse_too_many(folder, sum(map(_is_named_as_picture, files)), most)
    paths, facts, unusable = [], [], []
    for path, result in zip(files, check_images(files, limits=limits), strict=True):
        if isinstance(result, NotAPictureError) and not _is_named_as_picture(path):
            others.append(printable(path.name))
        elif isinstance(result, PictureError):
            unusable.append(f"{printable(path.name)} ({result.reason})")
        else:
            paths.append(path)
            facts.append(result)
    by_path = dict(zip(paths, facts, strict=True))
    mask_of = masks.beside(paths)
    paths = [path for path in paths if path not in mask_of.values()]
    _refuse_too_many(folder, len(paths), most)
    of_pictures = [mask_of.get(path) for path in paths] if mask_of else []
    return Pictures(
        paths=tuple(paths),
        facts=tuple(by_path[path] for path in paths),
        masks=tuple(of_pictures),
        mask_facts=tuple(None if mask is None else by_path[mask] for mask in of_pictures),
        unusable=tuple(unusable),
        others=tuple(sorted(others)),
    )


def _refuse_too_many(folder: Path, pictures: int, most: int) -> None:
    if pictures > most:
        raise DatasetError(
            f"The folder {printable(folder)} holds {pictures} pictures, more than the {most} "
            "allowed: DreamBooth wants 4 to 20 good pictures of one subject."
        )


def _is_named_as_picture(path: Path) -> bool:
    return path.suffix.lower() in _PICTURE_SUFFIXES


def _entries(folder: Path, limits: Limits) -> list[os.DirEntry[str]]:
    found: list[os.DirEntry[str]] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                found.append(entry)
                if len(found) > limits.max_folder_entries:
                    raise DatasetError(
                        f"The folder {printable(folder)} has more than {limits.max_folder_entries} "
                        "entries: give a folder that holds the training pictures alone."
                    )
    except OSError as error:
        raise DatasetError(
            f"The folder {printable(folder)} cannot be listed ({why(error)}): "
            "check its permissions."
        ) from error
    return sorted(found, key=lambda entry: entry.name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of symbolic links
        return False


def skipped(found: Pictures, where: str) -> list[str]:
    """Return at most two sentences on what was skipped: unusable pictures, and other entries."""
    notes = []
    if found.unusable:
        noun = "1 picture" if len(found.unusable) == 1 else f"{len(found.unusable)} pictures"
        notes.append(f"Skipped {noun} in {where} that cannot be used: {listed(found.unusable)}.")
    if found.others:
        count = len(found.others)
        noun = "1 entry (no picture)" if count == 1 else f"{count} entries (no pictures)"
        notes.append(f"Skipped {noun} in {where}: {listed(found.others)}.")
    return notes
