"""Print the table of knobs as strings, JSON, text for a terminal, Markdown and ``--help``.

Everything is derived from `Hyperparameters`, so that nothing is written down twice. Standard
library only.
"""

from __future__ import annotations

import argparse
import json

from dreambooth.settings.hyperparameters import KNOBS, Hyperparameters
from dreambooth.settings.knob import ACCEPTED, BARE_FLAG, OURS, PUBLISHED, Knob


def as_strings(hyperparameters: Hyperparameters) -> dict[str, str]:
    """Return every setting as a string, as SageMaker stores it; the published names come first."""
    return {knob.name: str(getattr(hyperparameters, knob.name)) for knob in KNOBS}


def defaults() -> dict[str, str]:
    """Return every default as the string that the SDK's ``retrieve_default()`` returns."""
    return as_strings(Hyperparameters())


def as_json(hyperparameters: Hyperparameters | None = None) -> str:
    """Return the given settings, or the defaults, as one flat JSON object of strings."""
    return json.dumps(as_strings(hyperparameters or Hyperparameters()), indent=2)


def as_text() -> str:
    """Return the table for a terminal, in the order of the class, under three headings."""
    lines: list[str] = []
    for origin in (PUBLISHED, ACCEPTED, OURS):
        lines.append(f"{origin}:")
        for knob in KNOBS:
            if knob.origin == origin:
                lines.append(f"  {knob.name} = {knob.default}   ({knob.values})")
                lines.append(f"      {knob.sentence}")
        lines.append("")
    return "\n".join(lines).rstrip()


def as_markdown() -> str:
    """Return the README's table; a tick marks the published names."""
    rows = ["| published | name | default | values | what it does |", "|:-:|---|---|---|---|"]
    for knob in KNOBS:
        tick = "✓" if knob.published else ""
        rows.append(
            f"| {tick} | `{knob.name}` | `{knob.default}` | {knob.values} | {knob.sentence} |"
        )
    return "\n".join(rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one option per knob, spelled with ``_`` or ``-``; values stay raw.

    A bare ``--flag`` becomes BARE_FLAG; options that are not given are absent from the namespace.
    """
    for origin in (PUBLISHED, ACCEPTED, OURS):
        group = parser.add_argument_group(f"hyperparameters, {origin}")
        for knob in KNOBS:
            if knob.origin == origin:
                _add_argument(group, knob)


def _add_argument(group: argparse._ArgumentGroup, knob: Knob) -> None:
    help_text = f"{knob.sentence} ({knob.values}; default: {knob.default})".replace("%", "%%")
    dashed = knob.name.replace("_", "-")
    spellings = [(f"--{knob.name}", help_text)]
    if dashed != knob.name:
        spellings.append((f"--{dashed}", argparse.SUPPRESS))
    for option, help_ in spellings:
        group.add_argument(
            option,
            dest=knob.name,
            nargs="?",
            const=BARE_FLAG,
            default=argparse.SUPPRESS,
            metavar="X" if knob.kind != "bool" else "True|False",
            help=help_,
        )
