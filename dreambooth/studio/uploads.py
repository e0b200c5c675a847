"""Take the pictures that a browser sends into the folder of a draft.

A file is streamed to the disk, never held in memory, and it takes its place only once it has
decoded as a picture, an iPhone's HEIC as a PNG. Its name is made of the sent one's letters and
digits; it is never a path.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import secrets
import shutil
import unicodedata
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from dreambooth.data import images
from dreambooth.data.images import ImageFacts
from dreambooth.data.picture_files import PictureError, format_of, opened
from dreambooth.errors import UserError, one_line
from dreambooth.limits import LIMITS, Limits, size_in_words
from dreambooth.process import files
from dreambooth.runs import run_folder
from dreambooth.runs.run_folder import Run, RunState
from dreambooth.studio import heic

_PART: Final = ".upload-"  # a name that no listed picture has
_ENDINGS: Final = {
    **{"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "BMP": ".bmp"},
    **{"GIF": ".gif", "TIFF": ".tif", "AVIF": ".avif"},
}
_MOST_NAME_CHARACTERS: Final = 60
_ELSEWHERE: Final = "start the page with another --dir"


def pictures(run: Run) -> list[Path]:
    """Return the uploaded pictures of a run, in the order of their names."""
    return sorted(
        path
        for path in (run.folder / run_folder.PICTURES).glob("*")
        if path.suffix in _ENDINGS.values() and not path.name.startswith(".")
    )


async def add(
    run: Run, sent_name: str, content: AsyncIterator[bytes], *, limits: Limits = LIMITS
) -> Path:
    """Store one picture of a draft and return its path; raise UserError with a sentence if wrong.

    A picture that is there already is not stored again. Raises ResourceError for a full disk.
    """
    shown = one_line(sent_name, 100)
    _refuse_unless_draft(run)
    if len(pictures(run)) >= limits.max_uploaded_pictures:
        raise UserError(
            f"{shown} was not taken: a run has at most {limits.max_uploaded_pictures} uploaded "
            "pictures; 4 to 20 good ones are enough."
        )
    folder = run.folder / run_folder.PICTURES
    part = folder / f"{_PART}{secrets.token_hex(8)}"
    try:
        with files.disk_faults_named("The picture", folder, elsewhere=_ELSEWHERE):
            folder.mkdir(exist_ok=True)
            await _receive(part, shown, content, limits)
        return await asyncio.to_thread(_take, run, part, sent_name, limits)
    except PictureError as error:
        advice = "choose another one"
        if _is_heic(error):
            advice = (
                "on an iPhone choose Settings, Camera, Formats, Most Compatible, or share the "
                "picture by mail, which makes a JPEG of it"
            )
        raise UserError(f"{shown} {error.reason}: {advice}.") from error
    finally:
        part.unlink(missing_ok=True)


def copy_from(run: Run, folder: Path, *, limits: Limits = LIMITS) -> None:
    """Copy the pictures of a folder into a draft's, as many as it may have; leave out the rest."""
    _refuse_unless_draft(run)
    target = run.folder / run_folder.PICTURES
    with files.disk_faults_named("The pictures", target, elsewhere=_ELSEWHERE):
        target.mkdir(exist_ok=True)
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if len(pictures(run)) >= limits.max_uploaded_pictures:
                break
            part = target / f"{_PART}{secrets.token_hex(8)}"
            with contextlib.suppress(PictureError):
                try:
                    with opened(path, limits=limits) as source, part.open("xb") as copy:
                        shutil.copyfileobj(source, copy)
                    _take(run, part, path.name, limits)
                finally:
                    part.unlink(missing_ok=True)


def remove(run: Run, name: str) -> None:
    """Remove one picture of a draft. Raises UserError if there is none of this name."""
    _refuse_unless_draft(run)
    picture(run, name).unlink(missing_ok=True)


def picture(run: Run, name: str) -> Path:
    """Return the uploaded picture of this name; raise UserError if there is none."""
    for path in pictures(run):  # so that a name can be no path
        if path.name == name:
            return path
    raise UserError(f"There is no picture {one_line(name, 100)} in the run {run.name}.")


def _refuse_unless_draft(run: Run) -> None:
    if run.state() != RunState.DRAFT:
        raise UserError(f"The run {run.name} is no draft any more: its pictures stay as they are.")


async def _receive(part: Path, shown: str, content: AsyncIterator[bytes], limits: Limits) -> None:
    most, received = limits.max_image_file_bytes, 0
    # Not through a link, and never over a file that is there.
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
    with os.fdopen(descriptor, "wb") as file:
        async for chunk in content:
            received += len(chunk)
            if received > most:
                raise UserError(f"{shown} has more than the {size_in_words(most)} allowed.")
            await asyncio.to_thread(file.write, chunk)


def _take(run: Run, part: Path, sent_name: str, limits: Limits) -> Path:
    """Give a received file its name, if it is a picture that is not there yet."""
    found = _checked(part, limits)
    for path in pictures(run):
        if path.stat().st_size == part.stat().st_size and _sha256(path) == found.sha256:
            return path
    with opened(part, limits=limits) as file:
        ending = _ENDINGS[format_of(file) or ""]
    stem = _stem(sent_name)
    with files.disk_faults_named("The picture", part.parent, elsewhere=_ELSEWHERE):
        number = 1
        while True:
            counted = stem if number == 1 else f"{stem}-{number}"
            path = part.with_name(counted + ending)
            try:
                os.link(part, path)  # unlike a rename it replaces no other picture
            except FileExistsError:
                number += 1
            else:
                return path


def _checked(part: Path, limits: Limits) -> ImageFacts:
    """Return the facts of a picture that decodes; one in HEIC becomes a PNG.

    Raises PictureError.
    """
    try:
        return images.check_image(part, limits=limits)
    except PictureError as error:
        if not (_is_heic(error) and heic.replace_by_png(part, limits=limits)):
            raise
    return images.check_image(part, limits=limits)


def _is_heic(error: PictureError) -> bool:
    return error.reason.startswith("is in HEIC")


def _stem(sent_name: str) -> str:
    """Return the letters and digits of a file's name, with single dashes between them."""
    stem = unicodedata.normalize("NFC", re.split(r"[/\\]", sent_name)[-1]).rpartition(".")
    words = re.findall(r"[^\W_]+", stem[0] or stem[2])
    return "-".join(words)[:_MOST_NAME_CHARACTERS].strip("-") or "picture"


def _sha256(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
