"""The parser of our command lines: options with `-` or `_`, and whatever begins like one alone."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any


class Parser(argparse.ArgumentParser):
    """An argparse parser whose options are declared with `_` and may be given with `-` as well.

    Declared in both spellings, an abbreviation such as `--guidance` would fit two options of one
    meaning, which argparse calls ambiguous.
    """

    def parse_known_args(  # type: ignore[override]  # argparse declares overloads
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """Parse as argparse does, after spelling the options' names with `_`."""
        given = args if args is None else [_with_underscores(word) for word in args]
        return super().parse_known_args(given, namespace)


def _with_underscores(word: str) -> str:
    name, equals, value = word.partition("=")
    is_option = name.startswith("--") and " " not in name
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if is_option else word
