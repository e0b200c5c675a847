"""Describe one setting of a job, and parse its value from what a client sends.

SageMaker's clients send a value as a Python value, its ``str()``, its JSON, or JSON of its
``str()``; a `Knob` reads all of them. The table of all knobs is `Hyperparameters`; `published`,
`accepted` and `ours` declare its fields. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from dataclasses import Field, dataclass, field
from typing import Any, Final

from dreambooth.errors import quoted
from dreambooth.limits import LIMITS, Limits

PUBLISHED: Final = "published"
ACCEPTED: Final = "accepted by JumpStart, not published"
OURS: Final = "ours"

Value = bool | int | float | str | None


class BareFlag:
    """The value of a command-line option given without one; for a boolean knob it means True."""


BARE_FLAG: Final = BareFlag()


def published(default: Value, sentence: str, **rules: object) -> Any:
    """Declare a knob with a published name and default; ``rules`` are attributes of Knob."""
    return _declared(default, sentence, PUBLISHED, rules)


def accepted(default: Value, sentence: str, **rules: object) -> Any:
    """Declare a knob that JumpStart accepts without having published it."""
    return _declared(default, sentence, ACCEPTED, rules)


def ours(default: Value, sentence: str, **rules: object) -> Any:
    """Declare a knob of our own."""
    return _declared(default, sentence, OURS, rules)


def _declared(default: Value, sentence: str, origin: str, rules: dict[str, object]) -> Any:
    return field(default=default, metadata={"sentence": sentence, "origin": origin, **rules})


@dataclass(frozen=True, slots=True, kw_only=True)
class Knob:
    """One row of the table of knobs."""

    name: str
    kind: str
    default: Value
    sentence: str
    origin: str
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    multiple_of: int | None = None
    choices: tuple[str, ...] = ()

    @classmethod
    def of(cls, entry: Field[Any]) -> Knob:
        """Return the row that a field of the table declares."""
        return cls(
            name=entry.name,
            kind=str(entry.type).removesuffix(" | None"),
            default=entry.default,  # type: ignore[arg-type]  # every field has one
            **entry.metadata,
        )

    @property
    def published(self) -> bool:
        """Return whether JumpStart published this name and default."""
        return self.origin == PUBLISHED

    @property
    def values(self) -> str:
        """Return the allowed values in words: ``a whole number, at least 1``."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        if self.kind == "str":
            return "a text"
        bounds = (
            ("above {}", self.above),
            ("at least {}", self.minimum),
            ("below {}", self.below),
            ("at most {}", self.maximum),
            ("a multiple of {}", self.multiple_of),
        )
        limits = [words.format(_number(bound)) for words, bound in bounds if bound is not None]
        return ", ".join([_KIND_IN_WORDS[self.kind], *limits])

    def parse(self, raw: object, limits: Limits = LIMITS) -> Value:
        """Return the typed value of what a client sent; raise ValueError if it is not allowed.

        An empty value means the default. The message of the error is one sentence.
        """
        if isinstance(raw, BareFlag):
            if self.kind == "bool":
                return True
            raise ValueError(f"{self.name} needs a value: {self.values}.")
        if isinstance(raw, str) and len(raw) > limits.max_hyperparameter_characters:
            longest = limits.max_hyperparameter_characters
            raise ValueError(f"{self.name} has {len(raw)} characters; at most {longest} are read.")
        text = unwrapped(raw)
        if text in ("", "None", "null"):
            return self.default
        value = None if text is None else _PARSERS[self.kind](text)
        if value is None or not self._allows(value):
            raise ValueError(f"{self.name} must be {self.values}, not {quoted(raw)}.")
        return value

    def _allows(self, value: bool | int | float | str) -> bool:
        if self.choices:
            return value in self.choices
        if isinstance(value, (bool, str)):
            return True
        return (
            (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and (self.minimum is None or value >= self.minimum)
            and (self.maximum is None or value <= self.maximum)
            and (self.multiple_of is None or value % self.multiple_of == 0)
        )


_KIND_IN_WORDS: Final = {"bool": "True or False", "int": "a whole number", "float": "a number"}


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
    if re.fullmatch(r"[+-]?[0-9]{1,18}", text):
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


_PARSERS: Final = {"bool": _bool, "int": _int, "float": _float, "str": _str}


def _number(bound: float) -> str:
    return str(int(bound)) if float(bound).is_integer() else repr(bound)
