"""Parse JSON from untrusted clients into plain Python values.

It reads RFC 8259 in UTF-8 with Python's own decoder, and refuses what other parsers disagree about:
duplicate keys, lone surrogates, numbers that a double cannot hold. Nesting and the number of values
are bounded, and time is linear in the length.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from dreambooth.errors import RequestError
from dreambooth.limits import LIMITS, Limits

# A whole string, or a bracket or comma outside of all strings; the group takes part in those that
# another value follows. The closing quote is optional, so that an unterminated string is one match
# to the end and not a new search from every quote in it.
_TOKEN = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{},]((?<=,)|(?<=[\[{])(?!\s*[\]}]))?', re.DOTALL)
_DEPTH_BY_MARK = {"[": 1, "{": 1, "]": -1, "}": -1}
_TOKENS_PER_VALUE = 4  # at most: its brackets, its key and a comma


def loads(body: bytes | bytearray | str, *, limits: Limits = LIMITS) -> Any:
    """Return the value that a JSON text holds.

    Raises RequestError (400), in one sentence, for everything else: other encodings, a byte order
    mark, NaN, Infinity, 1e999, overlong numbers, too many values, deep nesting, duplicate keys,
    lone surrogates.
    """
    text = decode(body)
    _check_size(text, limits)

    def number(literal: str) -> str:
        if len(literal) > limits.max_json_number_characters:
            raise RequestError(
                f"The body's JSON holds a number of {len(literal)} characters; at most "
                f"{limits.max_json_number_characters} are read."
            )
        if not math.isfinite(float(literal)):
            raise RequestError(
                f"The body's JSON holds the number {literal}, which is out of range."
            )
        return literal

    try:
        value = json.loads(
            text,
            parse_int=lambda literal: int(number(literal)),
            parse_float=lambda literal: float(number(literal)),
            parse_constant=_refuse_constant,
            object_pairs_hook=_without_duplicates,
        )
        # Lone surrogates come from escapes such as \ud800 without their second half.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise RequestError(
            f"The body is not valid JSON: {error.msg} (line {error.lineno}, column {error.colno})."
        ) from error
    except UnicodeEncodeError as error:
        raise RequestError(
            "The body's JSON holds a lone surrogate, which is no character."
        ) from error
    return value


def decode(body: bytes | bytearray | str) -> str:
    """Return the text of a UTF-8 body; a str counts as already decoded.

    Raises RequestError (400) for other encodings, a byte order mark and lone surrogates.
    """
    try:
        text = body if isinstance(body, str) else str(body, "utf-8")
        text.encode("utf-8")
    except UnicodeError as error:
        raise RequestError("The body is not valid UTF-8 text; send it encoded as UTF-8.") from error
    if text.startswith("\ufeff"):
        raise RequestError("The body begins with a byte order mark; send UTF-8 without one.")
    return text


def _check_size(text: str, limits: Limits) -> None:
    """Refuse too many values and too deep nesting before anything is built.

    Python's decoder recurses, but never deeper than the running count of brackets: it stops at the
    first bracket that does not match. Of valid JSON the count of values is exact; of other texts
    the decoder never builds more.
    """
    depth, values = 0, 1
    for tokens, token in enumerate(_TOKEN.finditer(text), start=1):
        values += token[1] is not None
        if max(values, tokens / _TOKENS_PER_VALUE) > limits.max_json_values:
            raise RequestError(f"The body's JSON holds more than {limits.max_json_values} values.")
        depth += _DEPTH_BY_MARK.get(text[token.start()], 0)
        if depth > limits.max_json_depth:
            raise RequestError(
                f"The body's JSON is nested deeper than {limits.max_json_depth} levels; a request "
                "needs three."
            )


def _refuse_constant(name: str) -> NoReturn:
    raise RequestError(f"The body's JSON holds {name}, which is not a JSON number.")


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise RequestError(f"The body's JSON gives the key {printable(key)} twice.")
        found[key] = value
    return found


def printable(name: str) -> str:
    """Return a key or a header as error messages show it: printable, cut after 100 characters."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name[:101])
    return _cut(text)


def shown(value: object) -> str:
    """Return a value as error messages show it: as JSON, printable, cut after 100 characters.

    Strings are called so, because ``"64"`` is what a client sends that means 64.
    """
    text = json.dumps(value, ensure_ascii=False)[:101]
    text = _cut("".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text))
    if not isinstance(value, str):
        return text
    return f'{text}" (a string)' if text.endswith("…") else f"{text} (a string)"


def _cut(text: str) -> str:
    return text if len(text) <= 100 else text[:100] + "…"
