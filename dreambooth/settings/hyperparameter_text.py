"""Print the table of hyperparameters as strings, JSON, text for a terminal and Markdown.

Everything is derived from `Hyperparameters`, so that nothing is written down twice. Standard
library only.
"""

from __future__ import annotations

import json
from itertools import groupby

from dreambooth.settings.hyperparameters import KNOBS, PUBLISHED, Hyperparameters


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
    for origin, knobs in groupby(KNOBS, key=lambda knob: knob.origin):
        lines.append(f"{origin}:")
        for knob in knobs:
            lines.append(f"  {knob.name} = {knob.default}   ({knob.values})")
            lines.append(f"      {knob.sentence}")
        lines.append("")
    return "\n".join(lines).rstrip()


def as_markdown() -> str:
    """Return the table of docs/hyperparameters.md; a tick marks the published names."""
    rows = ["| published | name | default | values | what it does |", "|:-:|---|---|---|---|"]
    for knob in KNOBS:
        tick = "✓" if knob.origin == PUBLISHED else ""
        rows.append(
            f"| {tick} | `{knob.name}` | `{knob.default}` | {knob.values} | {knob.sentence} |"
        )
    return "\n".join(rows)
