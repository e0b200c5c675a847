"""Names the prompts that are drawn; reads those of a file: one a line, or DreamBooth's own list.

The paper's data set comes with Python code, lines like
``'a {0} {1} in the jungle'.format(unique_token, class_token),``. They are found by a pattern; no
code is run. Standard library only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from dreambooth.errors import UserError, quoted
from dreambooth.limits import LIMITS, Limits

_OF_THE_PAPER = re.compile(r"\s*'([^'\\]*)'\.format\(unique_token, class_token\),?\s*")
_SECTION = re.compile(r"\s*(Object|Live Subject) Prompts\s*")
_LIVE = ("cat", "dog")  # the classes of the paper's living subjects
_MOST_PROMPTS = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedPrompts:
    """The prompts that are drawn. own_class, other_class: of the subject's class and another one.

    elsewhere: those that put the subject into other places.
    """

    subject: str
    elsewhere: tuple[str, ...] = ()
    own_class: str | None = None
    other_class: str | None = None

    @property
    def all(self) -> tuple[str, ...]:
        """Return all prompts, each once."""
        classes = [prompt for prompt in (self.own_class, self.other_class) if prompt]
        return tuple(dict.fromkeys((self.subject, *self.elsewhere, *classes)))


def read(
    path: Path, *, instance_prompt: str, class_prompt: str | None, limits: Limits = LIMITS
) -> tuple[str, ...]:
    """Return the prompts of a file, in its order.

    Of the paper's two lists that for the subject's class is taken, and ``{0} {1}`` becomes the
    subject's name and class, as they stand in the two prompts of a data set. Raises UserError.
    """
    try:
        if path.stat().st_size > limits.max_config_bytes:
            raise UserError(f"--prompts {path} is larger than {limits.max_config_bytes} bytes.")
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise UserError(f"--prompts {path} cannot be read: {reason}.") from error
    if any(_OF_THE_PAPER.fullmatch(line) for line in lines):
        prompts = _of_the_paper(path, lines, instance_prompt, class_prompt)
    else:
        prompts = [line.strip() for line in lines if line.strip()]
    if not 1 <= len(prompts) <= _MOST_PROMPTS:
        raise UserError(
            f"--prompts {path} holds {len(prompts)} prompts, and must hold 1 to {_MOST_PROMPTS}, "
            "one a line."
        )
    for prompt in prompts:
        if len(prompt) > limits.max_prompt_characters:
            raise UserError(
                f"--prompts {path} holds a prompt of {len(prompt)} characters, more than "
                f"{limits.max_prompt_characters}: {quoted(prompt)}."
            )
    return tuple(dict.fromkeys(prompts))


def _of_the_paper(
    path: Path, lines: list[str], instance_prompt: str, class_prompt: str | None
) -> list[str]:
    tag, name = _named(path, instance_prompt, class_prompt)
    section, sections = "Object", dict[str, list[str]]()
    for line in lines:
        if heading := _SECTION.fullmatch(line):
            section = heading[1]
        elif found := _OF_THE_PAPER.fullmatch(line):
            text = found[1].replace("{0}", tag).replace("{1}", name)
            sections.setdefault(section, []).append(text)
    wanted = "Live Subject" if name.split()[-1].lower() in _LIVE else "Object"
    return sections.get(wanted) or next(iter(sections.values()))


def _named(path: Path, instance_prompt: str, class_prompt: str | None) -> tuple[str, str]:
    """Return the subject's own name and its class: "riobugger" and "cat".

    They stand in "a photo of a riobugger cat" beside "a photo of a cat".
    """
    words, of_class = instance_prompt.split(), (class_prompt or "").split()
    same = 0
    while same < min(len(words), len(of_class)) and words[same] == of_class[same]:
        same += 1
    rest = of_class[same:]
    if not rest or words[len(words) - len(rest) :] != rest or len(words) <= same + len(rest):
        raise UserError(
            f"--prompts {path} has places for the subject's name and class, which the data set "
            f"does not show: its class_prompt ({quoted(class_prompt)}) must be its "
            f"instance_prompt ({quoted(instance_prompt)}) without the name."
        )
    return " ".join(words[same : len(words) - len(rest)]), " ".join(rest)
