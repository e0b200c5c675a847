"""Describe one option of a verb, and parse its value from what a client sends or a user types.

The options of a verb are a frozen dataclass whose fields are declared with `option`; `knobs_of`
returns its rows. SageMaker's clients send a value as a Python value, its ``str()``, its JSON, or
JSON of its ``str()``; a `Knob` reads all of them. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final

from dreambooth.errors import UserError, quoted
from dreambooth.limits import LIMITS, Limits
from dreambooth.process import addresses

# Of the options of a single-file checkpoint, which train, serve, generate and convert share.
PREDICTION_TYPES: Final = ("epsilon", "v_prediction")
PREDICTION_TYPE_SENTENCE: Final = "What a single-file checkpoint predicts; None: as it says itself."
BASE_SENTENCE: Final = (
    "Diffusers folder from which a single-file checkpoint takes configurations and vocabulary; "
    "None: the published ones."
)


class BareFlag:
    """The value of a command-line option given without one; for a boolean knob it means True."""


BARE_FLAG: Final = BareFlag()


def option(default: Any, sentence: str, **rules: object) -> Any:
    """Declare a field that a user sets; ``rules`` are other attributes of its Knob."""
    return field(default=default, metadata={"sentence": sentence, **rules})


def knobs_of(table: type) -> tuple[Knob, ...]:
    """Return the rows of a table of options, one per field that was declared with `option`."""
    return tuple(
        Knob(
            **{
                "name": entry.name,
                "kind": str(entry.type).removesuffix(" | None"),
                "default": entry.default,
                **entry.metadata,
            }
        )
        for entry in fields(table)
        if entry.metadata
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Knob:
    """One row of a table of options.

    default: ``dataclasses.MISSING`` if the option must be given. origin: who named it, if it is a
    hyperparameter. alias: a second name on the command line. variables: give the value where the
    command line does not; the first one counts most. max_characters: None if it may have as many as
    a hyperparameter. is_repeated: whether it may be given several times. removed: choices of
    earlier versions, each with a clause that says what to choose instead.
    """

    name: str
    kind: str
    default: Any
    sentence: str
    origin: str = ""
    alias: str = ""
    variables: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    multiple_of: int | None = None
    choices: tuple[str, ...] = ()
    max_characters: int | None = None
    is_printable: bool = False
    is_repeated: bool = False
    removed: Mapping[str, str] = field(default_factory=dict)

    @property
    def values(self) -> str:
        """Return the allowed values in words: ``a whole number, at least 1``."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        if self.is_printable:
            return "a printable text"
        bounds = (
            ("above {}", self.above),
            ("at least {}", self.minimum),
            ("below {}", self.below),
            ("at most {}", self.maximum),
            ("a multiple of {}", self.multiple_of),
        )
        limits = [words.format(_number(bound)) for words, bound in bounds if bound is not None]
        return ", ".join([_KIND_IN_WORDS[self.kind], *limits])

    def parse(
        self, raw: object, limits: Limits = LIMITS, *, source: str = "", is_typed: bool = False
    ) -> Any:
        """Return the typed value of what was given; raise UserError, with one sentence, if wrong.

        source: the option or variable that gave it, if not the name alone. An empty value means the
        default. A text that a user typed (is_typed) is taken as it stands, also if it is empty.
        """
        source = source or self.name
        may_be_switched = "True" in self.choices  # or "False", or left to the job
        if isinstance(raw, BareFlag):
            if self.kind == "bool" or may_be_switched:
                return True if self.kind == "bool" else "True"
            raise UserError(f"{source} needs a value: {self.values}.")
        longest = self.max_characters or limits.max_hyperparameter_characters
        if isinstance(raw, str) and len(raw) > longest:
            raise UserError(f"{source} has {len(raw)} characters; at most {longest} are read.")
        if not is_typed and is_unset(raw):
            return self.default
        is_text = self.kind in ("str", "Path")
        text = str(raw) if is_typed and is_text else unwrapped(raw)
        value = None if text is None else _PARSERS[self.kind](text)
        if may_be_switched and text is not None and text.lower() in ("true", "false"):
            value = text.capitalize()
        if text is not None and text in self.removed:
            raise UserError(f"{source}={text} is gone: {self.removed[text]}.")
        if value is None or not self._allows(value):
            raise UserError(f"{source} must be {self.values}, not {quoted(raw)}.")
        return addresses.to_path(str(value), source) if self.kind == "Path" else value

    def _allows(self, value: bool | int | float | str) -> bool:
        if self.choices:
            return value in self.choices
        if isinstance(value, str):
            return not self.is_printable or (value != "" and value.isprintable())
        if isinstance(value, bool):
            return True
        return (
            (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and (self.minimum is None or value >= self.minimum)
            and value <= (self.maximum if self.maximum is not None else _GREATEST[self.kind])
            and (self.multiple_of is None or value % self.multiple_of == 0)
        )


_KIND_IN_WORDS: Final = {
    "bool": "True or False",
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "Path": "the path of a file or folder",
}
# Of numbers without a bound of their own.
_GREATEST: Final = {"int": 10**18 - 1, "float": math.inf}


def is_unset(raw: object) -> bool:
    """Return whether a client's value says nothing: it is empty, None or null."""
    return unwrapped(raw) in ("", "None", "null")


def unwrapped(raw: object) -> str | None:
    """Return a client's value as text, without one JSON layer and one pair of single quotes.

    Returns None for what cannot be a value (a list, an object).
    """
    if raw is None or isinstance(raw, bool):
        return str(raw)
    if isinstance(raw, (int, float)):
        return float.__repr__(raw) if isinstance(raw, float) else int.__repr__(raw)
    if not isinstance(raw, str):
        return None
    text = raw.strip()
    if len(text) >= 2 and text[0] == text[-1] == '"':
        # Other JSON values (true, null, 1) read the same with and without the layer.
        with contextlib.suppress(ValueError):  # not JSON, it only begins and ends with a quote
            text = str(json.loads(text, strict=False)).strip()
    if len(text) >= 2 and text[0] == text[-1] == "'":
        text = text[1:-1].strip()
    return text


def _bool(text: str) -> bool | None:
    return {"true": True, "false": False}.get(text.lower())


def _int(text: str) -> int | None:
    """Parse a whole number, also one written as ``400.0`` or ``4e2`` (tuners send floats)."""
    if re.fullmatch(r"[+-]?[0-9]{1,20}", text):
        return int(text)
    number = _float(text)
    if number is None or not number.is_integer() or abs(number) >= 2**53:
        return None  # from 2**53 on, one float stands for several whole numbers
    return int(number)


def _float(text: str) -> float | None:
    if not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text):
        return None
    number = float(text)
    return number if math.isfinite(number) else None


def _str(text: str) -> str | None:
    storable = "\0" not in text and not any("\ud800" <= c <= "\udfff" for c in text)
    return text if storable else None


def _path(text: str) -> str | None:
    try:
        return text if b"\0" not in os.fsencode(text) else None
    except UnicodeEncodeError:
        return None


_PARSERS: Final = {"bool": _bool, "int": _int, "float": _float, "str": _str, "Path": _path}


def _number(bound: float) -> str:
    return str(int(bound)) if float(bound).is_integer() else repr(bound)
