"""Read the prompts in dataset_info.json, with one clear sentence for each mistake in it."""

from __future__ import annotations

import ast
import difflib
import json
import os
import stat
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dreambooth.data.picture_files import listed, printable, why
from dreambooth.errors import DatasetError, quoted
from dreambooth.limits import LIMITS, Limits

INFO_NAME = "dataset_info.json"

_PYTHON_NOTATION_BYTES = 64 * 1024  # ast.literal_eval is not made for large untrusted texts
_FOLDERS_TRIED = 5


_SUBJECT_KEYS = ("folder", "instance_prompt", "class_prompt", "class_data_dir")
_EXAMPLE_SUBJECTS = (
    '{"subjects": [{"folder": "cat", "instance_prompt": "a photo of a riobugger cat", '
    '"class_prompt": "a photo of a cat"}, ...]}'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SubjectPrompts:
    """One subject's prompts as written, without surrounding white space.

    folder, class_data_dir: names inside the training folder, such as "dog1", as the list of several
    subjects gives them. folder is "" for a single subject, whose pictures lie beside the file.
    """

    folder: str = ""
    instance_prompt: str
    class_prompt: str | None
    class_data_dir: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """The subjects of dataset_info.json, one at least; `warnings` are whole sentences."""

    subjects: tuple[SubjectPrompts, ...]
    warnings: tuple[str, ...]

    @property
    def are_listed(self) -> bool:
        """Return whether the file lists subjects that have folders of their own."""
        return self.subjects[0].folder != ""


def read(
    folder: Path, *, with_prior_preservation: bool, inside: str, limits: Limits = LIMITS
) -> Prompts:
    """Read the prompts of a training folder; class_prompt is required with prior preservation.

    inside: the clause that says how to give a folder inside the training folder in its place.
    Raises DatasetError if the file is missing or too large, is not UTF-8, is neither JSON nor
    Python's notation, or has values of wrong types or lacks a prompt; of several subjects also for
    two that share a prompt or whose folders overlap, and for entries that mean nothing.
    """
    path = folder / INFO_NAME
    example = '{"instance_prompt": "a photo of a riobugger cat"'
    example += ', "class_prompt": "a photo of a cat"}' if with_prior_preservation else "}"
    info, notes = _parse_info(path, _info_text(path, example, inside, limits), example)
    if "subjects" in info:
        subjects = _several(path, info, with_prior_preservation, limits)
        return Prompts(subjects=subjects, warnings=tuple(notes))
    instance_prompt = prompt_in(path, info, "instance_prompt", limits)
    if instance_prompt is None:
        raise DatasetError(
            f"{printable(path)} gives no instance_prompt{_instead(info)}: "
            f"write for example {example}."
        )
    class_prompt = prompt_in(path, info, "class_prompt", limits)
    if with_prior_preservation and class_prompt is None:
        raise DatasetError(
            f"{printable(path)} gives no class_prompt, which with_prior_preservation=True needs: "
            f"write for example {example}, or set with_prior_preservation=False."
        )
    unknown = [
        printable(str(key)) for key in info if key not in ("instance_prompt", "class_prompt")
    ]
    if unknown:
        notes.append(f"{INFO_NAME} has entries that mean nothing here: {listed(unknown)}.")
    subject = SubjectPrompts(instance_prompt=instance_prompt, class_prompt=class_prompt)
    return Prompts(subjects=(subject,), warnings=tuple(notes))


def _several(
    path: Path, info: dict[object, object], with_prior_preservation: bool, limits: Limits
) -> tuple[SubjectPrompts, ...]:
    """Return the subjects of the list, whose prompts and folders differ from each other."""
    others = [printable(str(key)) for key in info if key != "subjects"]
    if others:
        raise DatasetError(
            f"{printable(path)} gives {listed(others)} beside subjects: write each prompt into the "
            f"entry of its subject, for example {_EXAMPLE_SUBJECTS}."
        )
    entries = info["subjects"]
    if not isinstance(entries, list) or not entries:
        found = "an empty list" if entries == [] else _kind(entries)
        raise DatasetError(
            f"subjects in {printable(path)} is {found}: it must be a list with an object for each "
            f"subject, for example {_EXAMPLE_SUBJECTS}."
        )
    if len(entries) > limits.max_subjects:
        raise DatasetError(
            f"{printable(path)} lists {len(entries)} subjects, more than the "
            f"{limits.max_subjects} allowed in one run."
        )
    subjects = tuple(
        _subject(path, number, entry, with_prior_preservation, limits)
        for number, entry in enumerate(entries, start=1)
    )
    _refuse_same_prompts(path, subjects)
    _refuse_overlapping_folders(path, subjects)
    return subjects


def _subject(
    path: Path, number: int, entry: object, with_prior_preservation: bool, limits: Limits
) -> SubjectPrompts:
    """Return one subject of the list."""
    where = f"in {printable(path)}"
    if not isinstance(entry, dict):
        raise DatasetError(
            f"Subject {number} {where} is {_kind(entry)}: it must be an object, as in "
            f"{_EXAMPLE_SUBJECTS}."
        )
    of = f"subject {number}"
    if isinstance(entry.get("folder"), str):
        of = f"the subject {quoted(entry['folder'])}"
    named = of[0].upper() + of[1:]
    for key in entry:
        if key not in _SUBJECT_KEYS:
            near = difflib.get_close_matches(str(key)[:100], _SUBJECT_KEYS, n=1)
            raise DatasetError(
                f"{named} {where} has an entry {quoted(key)}"
                + (f", did you mean {near[0]}?" if near else ".")
                + f" A subject may have {', '.join(_SUBJECT_KEYS)}."
            )
    folder = _name_inside(f"folder of {of} {where}", entry.get("folder"))
    class_data_dir = entry.get("class_data_dir")
    if class_data_dir is not None:
        class_data_dir = _name_inside(f"class_data_dir of {of} {where}", class_data_dir)
    prompts = {
        key: prompt_in(path, entry, key, limits, of=f" of {of}")
        for key in ("instance_prompt", "class_prompt")
    }
    if prompts["instance_prompt"] is None:
        raise DatasetError(
            f"{named} {where} gives no instance_prompt: write one, as in {_EXAMPLE_SUBJECTS}."
        )
    if with_prior_preservation and prompts["class_prompt"] is None:
        raise DatasetError(
            f"{named} {where} gives no class_prompt, which with_prior_preservation=True needs: "
            f"write one, as in {_EXAMPLE_SUBJECTS}, or set with_prior_preservation=False."
        )
    return SubjectPrompts(
        folder=folder,
        instance_prompt=prompts["instance_prompt"],
        class_prompt=prompts["class_prompt"],
        class_data_dir=class_data_dir,
    )


def _name_inside(where: str, value: object) -> str:
    """Return the name of a folder inside the training folder, with its parts checked."""
    if value is None:
        raise DatasetError(
            f"There is no {where}: name the folder of its pictures, inside the training folder."
        )
    if not isinstance(value, str):
        raise DatasetError(f"The {where} is {_kind(value)}: it must be a folder's name in quotes.")
    parts = value.strip().rstrip("/").split("/")
    is_plain = value.isprintable() and "\\" not in value
    if not is_plain or value.startswith("/") or any(part in ("", ".", "..") for part in parts):
        raise DatasetError(
            f"The {where} is {quoted(value)}: it must be the name of a folder inside the training "
            "folder, such as dog1 or dogs/dog1."
        )
    return "/".join(parts)


def _refuse_same_prompts(path: Path, subjects: tuple[SubjectPrompts, ...]) -> None:
    seen: dict[str, SubjectPrompts] = {}
    for subject in subjects:
        read_as = " ".join(subject.instance_prompt.lower().split())  # as the tokenizer does
        if (other := seen.setdefault(read_as, subject)) is not subject:
            raise DatasetError(
                f"The subjects {other.folder} and {subject.folder} in {printable(path)} have the "
                f"same instance_prompt, {quoted(subject.instance_prompt)}: give each a name of its "
                "own, or put their pictures into one folder if they are one subject."
            )


def _refuse_overlapping_folders(path: Path, subjects: tuple[SubjectPrompts, ...]) -> None:
    classes: dict[str, SubjectPrompts] = {}
    for number, subject in enumerate(subjects):
        for other in subjects[:number]:
            one, another = (f"{each.folder}/".lower() for each in (subject, other))
            if one.startswith(another) or another.startswith(one):
                raise DatasetError(
                    f"The folders of the subjects {other.folder} and {subject.folder} in "
                    f"{printable(path)} overlap: give each subject a folder of its own."
                )
        if subject.class_data_dir is None:
            continue
        for other in subjects:
            if other.folder.lower() == subject.class_data_dir.lower():
                raise DatasetError(
                    f"class_data_dir of the subject {subject.folder} in {printable(path)} is the "
                    f"folder of the subject {other.folder}: put the class images into another one."
                )
        other = classes.setdefault(subject.class_data_dir.lower(), subject)
        if other.class_prompt != subject.class_prompt:
            raise DatasetError(
                f"The subjects {other.folder} and {subject.folder} in {printable(path)} have the "
                "same class_data_dir and different class_prompts: give each class its own folder."
            )


def _info_text(path: Path, example: str, inside: str, limits: Limits) -> str:
    """Return the text of dataset_info.json, a regular file of UTF-8 (with or without a BOM)."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise DatasetError(f"{printable(path)} is not a regular file: write {example} into it.")
        with open(path, "rb") as file:
            data = file.read(limits.max_dataset_info_bytes + 1)
    except FileNotFoundError as error:
        raise DatasetError(
            f"{INFO_NAME} is missing in {printable(path.parent)}{_lookalike(path.parent, inside)}: "
            f"write it with the subject's prompt, for example {example}."
        ) from error
    except OSError as error:
        raise DatasetError(
            f"{printable(path)} cannot be read ({why(error)}): check its permissions."
        ) from error
    if len(data) > limits.max_dataset_info_bytes:
        raise DatasetError(
            f"{printable(path)} has more than {limits.max_dataset_info_bytes} bytes: "
            f"it should hold two prompts alone, for example {example}."
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{printable(path)} is not UTF-8 (at byte {error.start}): save it as UTF-8 text."
        ) from error


def _lookalike(folder: Path, inside: str) -> str:
    """Return a hint at a similar file: Windows hides suffixes, and archives often add a folder."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return ""
    for name in names:
        if name.lower().startswith("dataset_info") and name != INFO_NAME:
            return f" (there is {printable(name)}, which is another name)"
    for name in names[:_FOLDERS_TRIED]:
        if os.path.isfile(folder / name / INFO_NAME):
            return f" (there is one in its sub-folder {printable(name)}: {inside}?)"
    return ""


def _parse_info(path: Path, text: str, example: str) -> tuple[dict[object, object], list[str]]:
    notes: list[str] = []
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        value = _python_notation(text)
        if value is None:
            raise DatasetError(
                f"{printable(path)} is not valid JSON ({_json_fault(text, error)}): "
                f"write for example {example}."
            ) from error
        notes.append(
            f"{INFO_NAME} is not JSON but was understood as Python's notation: JSON wants double "
            f"quotes and no trailing comma, as in {example}."
        )
    if not isinstance(value, dict):
        raise DatasetError(
            f"{printable(path)} holds {_kind(value)} instead of an object with prompts: "
            f"write for example {example}."
        )
    return value, notes


def _json_fault(text: str, error: BaseException) -> str:
    if not text.strip():
        return "it is empty"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    hint = "; typographic quotes do not count" if set("“”„‘’") & set(text) else ""
    if isinstance(error, json.JSONDecodeError):
        return f"line {error.lineno}, column {error.colno}: {error.msg}{hint}"
    return printable(str(error))[:200]


def _python_notation(text: str) -> object | None:
    """Read a dict as published, {'instance_prompt': '...'}; return None for any other text."""
    if len(text) > _PYTHON_NOTATION_BYTES:
        return None
    try:
        with warnings.catch_warnings():  # stray backslashes cause warnings
            warnings.simplefilter("ignore")
            value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def prompt_in(
    path: Path, info: dict[object, object], key: str, limits: Limits, *, of: str = ""
) -> str | None:
    """Return the prompt under a key, without surrounding white space; None if missing or empty.

    of: says whose prompt it is, for messages. Raises DatasetError for a value that is none.
    """
    value = info.get(key)
    if value is None:
        return None
    where = f"{key}{of} in {printable(path)}"
    if not isinstance(value, str):
        raise DatasetError(f"{where} is {_kind(value)}: it must be one text in quotes.")
    if len(value) > limits.max_prompt_characters:
        raise DatasetError(
            f"{where} has {len(value)} characters, more than the {limits.max_prompt_characters} "
            "allowed: a few words are enough."
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DatasetError(
            f"{where} holds half a character (\\ud8..) at position {error.start}: retype it."
        ) from error
    return value.strip() or None


def _instead(info: dict[object, object]) -> str:
    """Return in brackets what the file has in place of an instance_prompt."""
    if "instance_prompt" in info:
        return f" (it is {'empty' if info['instance_prompt'] is not None else 'null'})"
    keys = [printable(str(key)) for key in info]
    known = ("instance_prompt", "subjects")
    near = [name for key in keys for name in difflib.get_close_matches(key[:100], known, n=1)]
    hint = f"; did you mean {near[0]}?" if near else ""
    return f" (it has {listed(keys)}{hint})" if info else ""


def _kind(value: object) -> str:
    kinds: Iterable[tuple[type, str]] = (
        (bool, "true or false"),
        (str, "a text"),
        (int, "a number"),
        (float, "a number"),
        (list, "a list"),
        (tuple, "a list"),
        (dict, "an object"),
        (type(None), "null"),
    )
    return next((name for kind, name in kinds if isinstance(value, kind)), "something else")
