"""Read which subjects a fine-tuned model was taught, from its folder's `__model_info__.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dreambooth.errors import ModelArtifactError
from dreambooth.limits import LIMITS, Limits
from dreambooth.model_folder import layout


@dataclass(frozen=True, slots=True, kw_only=True)
class TaughtSubject:
    """The prompts of a subject that the model draws; class_prompt: None without one."""

    instance_prompt: str
    class_prompt: str | None = None


def read(folder: Path, *, limits: Limits = LIMITS) -> tuple[TaughtSubject, ...]:
    """Return the subjects that a model was taught, in their order; none of a base model.

    The file is a stranger's: at most `max_subjects` are read, and those whose prompts are no texts,
    empty or too long are left out. A model of an earlier version names one subject.
    """
    path = folder / layout.MODEL_INFO
    try:
        info = layout.read_json(path, limits=limits) if path.is_file() else {}
    except ModelArtifactError:
        return ()
    entries = info.get("subjects", [info])
    found: dict[str, TaughtSubject] = {}
    for entry in entries[: limits.max_subjects] if isinstance(entries, list) else ():
        if not isinstance(entry, Mapping):
            continue
        instance_prompt = _prompt(entry.get("instance_prompt"), limits)
        if instance_prompt is not None:
            class_prompt = _prompt(entry.get("class_prompt"), limits)
            found[instance_prompt] = TaughtSubject(
                instance_prompt=instance_prompt, class_prompt=class_prompt
            )
    return tuple(found.values())


def _prompt(value: object, limits: Limits) -> str | None:
    """Return a prompt, None where it is none that a text encoder could read."""
    if not isinstance(value, str) or not 0 < len(value.strip()) <= limits.max_prompt_characters:
        return None
    is_whole = not any("\ud800" <= letter <= "\udfff" for letter in value)
    return value.strip() if is_whole else None
