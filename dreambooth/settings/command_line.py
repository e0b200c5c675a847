"""Parse our command lines: options may be spelled with `-` or `_`, and abbreviated."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any


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
