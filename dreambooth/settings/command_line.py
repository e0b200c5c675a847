"""Make our command lines from tables of options, and read what they were given.

Options may be spelled with `-` or `_`, and abbreviated. Standard library only.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING
from itertools import groupby
from typing import Any, Final

from dreambooth.errors import UserError
from dreambooth.settings.knob import BARE_FLAG, Knob, is_unset, unwrapped

_METAVARS: Final = {"bool": "True|False", "int": "N", "float": "X", "str": "TEXT", "Path": "PATH"}


class Parser(argparse.ArgumentParser):
    """An argparse parser whose options are declared with `_` and may be given with `-` as well.

    If both spellings were declared, argparse would refuse an abbreviation such as `--guidance` as
    ambiguous, because it fits both.
    """

    def parse_known_args(  # type: ignore[override]  # argparse declares overloads
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """Parse as argparse does, after rewriting the options' names with `_`."""
        given = args if args is None else [_with_underscores(word) for word in args]
        return super().parse_known_args(given, namespace)


def _with_underscores(word: str) -> str:
    name, equals, value = word.partition("=")
    is_option = name.startswith("--") and " " not in name
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if is_option else word


def add_arguments(parser: argparse.ArgumentParser, knobs: Iterable[Knob]) -> None:
    """Add one option per knob; values stay strings, and a bare ``--flag`` becomes BARE_FLAG.

    Options that are not given are absent from the namespace.
    """
    for origin, rows in groupby(knobs, key=lambda knob: knob.origin):
        group = parser.add_argument_group(f"hyperparameters, {origin}") if origin else parser
        for knob in rows:
            default = "" if knob.default in (MISSING, "") else f"; default: {knob.default}"
            how: dict[str, Any] = {"action": "append"} if knob.is_repeated else {}
            if knob.kind == "bool":
                how = {"nargs": "?", "const": BARE_FLAG}
            group.add_argument(
                *(f"--{name}" for name in (knob.name, knob.alias) if name),
                dest=knob.name,
                metavar=_METAVARS[knob.kind],
                default=argparse.SUPPRESS,
                help=f"{knob.sentence} ({knob.values}{default})".replace("%", "%%"),
                **how,
            )


def read(
    knobs: Iterable[Knob], arguments: argparse.Namespace, environ: Mapping[str, str]
) -> tuple[dict[str, Any], list[str]]:
    """Return the values that arguments and variables give, by name, and a sentence per fault."""
    values: dict[str, Any] = {}
    faults: list[str] = []
    for knob in knobs:
        source, given = _given(knob, arguments, environ)
        if not given and knob.default is MISSING:
            faults.append(f"{source} is missing: {knob.sentence}")
        parsed = []
        for raw in given:
            try:
                is_typed = source.startswith("--")
                parsed.append(knob.parse(_respelled(knob, raw), source=source, is_typed=is_typed))
            except UserError as fault:
                faults.append(str(fault))
        if parsed:
            values[knob.name] = tuple(parsed) if knob.is_repeated else parsed[0]
    return values, faults


def _given(
    knob: Knob, arguments: argparse.Namespace, environ: Mapping[str, str]
) -> tuple[str, list[Any]]:
    """Return the option or variable that gives a knob's values, and the values."""
    given = getattr(arguments, knob.name, None)
    if given is not None and (given != "" or knob.default is not MISSING):
        return f"--{knob.name}", given if knob.is_repeated else [given]
    for variable in knob.variables:
        if not is_unset(environ.get(variable)):
            return variable, [environ[variable]]
    return f"--{knob.name}", []


def _respelled(knob: Knob, raw: Any) -> Any:
    """Return one of a knob's choices in lower case, 1 and 0 as booleans, and other values as is."""
    text = (unwrapped(raw) or "").lower()
    if knob.kind == "bool" and text in ("0", "1"):
        return text == "1"
    return text if text in knob.choices else raw
