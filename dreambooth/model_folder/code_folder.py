"""Lists the content of a model archive's `code/` folder.

It consists of `inference.py`, every module of this package that it imports, and a requirements.txt.
The modules are found by following imports with `ast`, also those inside functions, so the folder
runs where this package is not installed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from dreambooth.errors import UserError

ROOT: Final = Path(__file__).parents[2]
ENTRY_POINT: Final = "inference.py"
_PACKAGE: Final = "dreambooth"

# Only lower bounds, and few of them: serving containers bring their own torch, and without a
# network pip must find every requirement installed already. The bounds are the oldest versions
# that tests/test_toolkits.py runs with.
REQUIREMENTS: Final = """\
torch>=2.11
diffusers>=0.35.2
transformers>=4.57.6
accelerate
huggingface-hub
numpy
pillow
safetensors
scipy
"""


def sources(root: Path = ROOT) -> list[Path]:
    """Return the files of `code/` relative to `root`, sorted: the entry point and its imports.

    Raises UserError where the entry point does not lie beside the package.
    """
    entry = root / ENTRY_POINT
    if not entry.is_file():
        raise UserError(f"There is no {ENTRY_POINT} beside the package in {root} to be packed.")
    found: set[Path] = set()
    waiting = [entry]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            for name in imports(path):
                waiting += _files(root, name)
    return sorted(path.relative_to(root) for path in found)


def imports(path: Path) -> Iterator[str]:
    """Yield the dotted names of all that a file may import; `from a import b` gives `a.b`."""
    for node in ast.walk(ast.parse(path.read_bytes(), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _files(root: Path, name: str) -> Iterator[Path]:
    """Yield the files that importing a module of this package runs: its packages' and its own."""
    parts = name.split(".")
    if parts[0] != _PACKAGE:
        return
    for depth in range(1, len(parts) + 1):
        place = root.joinpath(*parts[:depth])
        for path in (place / "__init__.py", place.with_suffix(".py")):
            if path.is_file():
                yield path
