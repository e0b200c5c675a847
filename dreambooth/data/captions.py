"""Read the captions of single pictures, which stand in for the instance prompt.

They stand in `captions.jsonl`, a JSON object with `file_name` and `text` on each line, or in
`NAME.txt` beside `NAME.jpg`, as other trainers write them.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dreambooth.data.folder import Pictures
from dreambooth.data.picture_files import NotAPictureError, listed, opened, printable
from dreambooth.data.prompts import SubjectPrompts, prompt_in
from dreambooth.errors import DatasetError, quoted
from dreambooth.limits import LIMITS, Limits

LIST_NAME = "captions.jsonl"
_EXAMPLE = '{"file_name": "1.jpg", "text": "a photo of a riobugger cat on a red sofa"}'
# Words that name no subject, where no class prompt says what is not its name.
_COMMON = frozenset(("a", "an", "the", "of", "my", "photo", "photograph", "picture", "image"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Captions:
    """The captions of a folder's pictures. texts: in the order of the pictures, None without one.

    pictures: those of the folder, without the files of captions among its `others`. warnings: whole
    sentences.
    """

    texts: tuple[str | None, ...]
    pictures: Pictures
    warnings: tuple[str, ...]


def read(
    folder: Path, found: Pictures, prompts: SubjectPrompts, *, limits: Limits = LIMITS
) -> Captions:
    """Read the captions of the pictures that were found in a folder.

    Raises DatasetError, one sentence, for a file that is not UTF-8 or too large, a line that is no
    caption, a picture that is not there or has two captions, and for an empty or too long text.
    """
    by_picture: dict[str, str] = {}
    used: set[str] = set()
    if (folder / LIST_NAME).exists():
        used.add(LIST_NAME)
        for name, text in _listed(folder / LIST_NAME, found, limits):
            by_picture[name] = text
    beside = {Path(name).stem: name for name in found.others if name.lower().endswith(".txt")}
    for picture in found.paths:
        own = beside.get(picture.stem)
        if own is None or not (folder / own).is_file():
            continue
        if LIST_NAME in used and picture.name in by_picture:
            raise DatasetError(
                f"{printable(folder / own)} and {LIST_NAME} both give a caption of "
                f"{printable(picture.name)}: keep one of them."
            )
        used.add(own)
        by_picture[picture.name] = _beside(folder / own, limits)
    if len(set(by_picture.values())) > limits.max_captions:
        raise DatasetError(
            f"The folder {printable(folder)} has {len(set(by_picture.values()))} different "
            f"captions, more than the {limits.max_captions} allowed: let pictures share some."
        )
    return Captions(
        texts=tuple(by_picture.get(path.name) for path in found.paths),
        pictures=replace(found, others=tuple(each for each in found.others if each not in used)),
        warnings=_without_the_name(by_picture, prompts),
    )


def _listed(path: Path, found: Pictures, limits: Limits) -> Iterator[tuple[str, str]]:
    """Yield (name of a picture, caption) of each line of captions.jsonl."""
    names = {each.name for each in found.paths}
    seen: set[str] = set()
    for number, line in enumerate(_text(path, limits.max_captions_bytes).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"Line {number} of {printable(path)}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DatasetError(
                f"{where} is not valid JSON: write one object a line, for example {_EXAMPLE}."
            ) from error
        if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
            raise DatasetError(f"{where} has no file_name in quotes: write it like {_EXAMPLE}.")
        name = entry["file_name"]
        text = prompt_in(path, entry, "text", limits, of=f" of line {number}")
        if text is None:
            raise DatasetError(
                f"{where} gives no text for {quoted(name)}: write one, or leave the line out to "
                "have the instance prompt."
            )
        if name in seen:
            raise DatasetError(f"{where} gives a second caption of {quoted(name)}: keep one.")
        seen.add(name)
        if name in names:
            yield name, _in_one_line(text)
        elif not any(each.startswith(f"{printable(name)} (") for each in found.unusable):
            near = difflib.get_close_matches(name[:200], sorted(names)[:1000], n=1)
            hint = f" Did you mean {printable(near[0])}?" if near else ""
            raise DatasetError(
                f"{where} names {quoted(name)}, which is no picture beside it: correct the name or "
                f"remove the line.{hint}"
            )


def _beside(path: Path, limits: Limits) -> str:
    """Return the caption in a text file."""
    text = _in_one_line(_text(path, 4 * limits.max_prompt_characters))
    if not text:
        raise DatasetError(
            f"The caption {printable(path)} is empty: write one, or remove the file to have the "
            "instance prompt."
        )
    if len(text) > limits.max_prompt_characters:
        raise DatasetError(
            f"The caption {printable(path)} has {len(text)} characters, more than the "
            f"{limits.max_prompt_characters} allowed: a sentence is enough."
        )
    return text


def _text(path: Path, most: int) -> str:
    """Return the text of a regular file of at most so many bytes, UTF-8 with or without a BOM."""
    try:
        with opened(path) as file:
            data = file.read(most + 1)
    except NotAPictureError as error:  # it says what is wrong with the file
        raise DatasetError(
            f"{printable(path)} {error.reason}: put a text of captions there, or remove it."
        ) from error
    if len(data) > most:
        raise DatasetError(
            f"{printable(path)} has more than {most} bytes: it should hold captions."
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{printable(path)} is not UTF-8 (at byte {error.start}): save it as UTF-8 text."
        ) from error


def _in_one_line(text: str) -> str:
    return " ".join(text.split())


def _without_the_name(by_picture: Mapping[str, str], prompts: SubjectPrompts) -> tuple[str, ...]:
    """Return a warning of captions that have no word of the subject's name."""
    name = _words(prompts.instance_prompt) - (_words(prompts.class_prompt or "") or _COMMON)
    nameless = [printable(each) for each, text in by_picture.items() if not name & _words(text)]
    if not (name and nameless):
        return ()
    said = " ".join(word for word in prompts.instance_prompt.split() if _words(word) & name)
    noun = "The caption" if len(nameless) == 1 else f"{len(nameless)} captions"
    verb = "does" if len(nameless) == 1 else "do"
    return (
        f"{noun} of {listed(nameless)} {verb} not name the subject ({printable(said)}): such a "
        "picture teaches its look under another name.",
    )


def _words(text: str) -> set[str]:
    return {word.strip(".,;:!?\"'()").lower() for word in text.split()}
