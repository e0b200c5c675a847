"""The texts that explain the project, for the tests that hold them against the code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
README: Final = (ROOT / "README.md").read_text("utf-8")
DOCUMENTS: Final = {
    str(path.relative_to(ROOT)): path.read_text("utf-8")
    for path in (
        ROOT / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
        ROOT / "benchmarks" / "LOG.md",
    )
}
"""README, docs/*.md and the log of experiments by their paths; README comes first."""

BLOCKS: Final = [
    block
    for text in DOCUMENTS.values()
    for block in re.findall(r"^```(.*?)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
]
"""(kind, code) of every block of code, in the order of DOCUMENTS."""


def blocks(kind: str) -> list[str]:
    """Return the code of all blocks of one kind, such as `sh`, in their order."""
    return [code for its_kind, code in BLOCKS if its_kind == kind]


def shell_block(word: str) -> str:
    """Return the only shell block in which the word stands."""
    (block,) = [block for block in blocks("sh") if word in block]
    return block


def shell_lines() -> list[list[str]]:
    """Return the words of each command in the shell blocks."""
    text = "\n".join(blocks("sh")).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]
