"""In the watched process: run a script as `python SCRIPT` does, then write what memory it took.

`python -m dreambooth.benchmarks.train_step.child MEMORY_FILE own|stand-in SCRIPT [ARGUMENT ...]`;
stand-in: `torchvision.transforms` is ours (`transforms_stand_in`).
"""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from dreambooth.report.timings import peak_memory_bytes


def main(argv: Sequence[str]) -> None:
    """Raises what the script raises."""
    memory_file, transforms, script, *arguments = argv
    if transforms == "stand-in":
        _stand_in_for_torchvision()
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        Path(memory_file).write_text(json.dumps(_memory()))


def _memory() -> dict[str, int | None]:
    allocated = reserved = None
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        allocated = torch.cuda.max_memory_allocated()
        reserved = torch.cuda.max_memory_reserved()
    return {"resident": peak_memory_bytes(), "allocated": allocated, "reserved": reserved}


def _stand_in_for_torchvision() -> None:
    from transformers.utils import is_torchvision_available

    from dreambooth.benchmarks.train_step import transforms_stand_in

    # transformers asks once and keeps the answer: it must not take the stand-in for the real one.
    is_torchvision_available()
    torchvision = ModuleType("torchvision")
    torchvision.__spec__ = ModuleSpec("torchvision", None)  # libraries ask for it by `find_spec`
    torchvision.transforms = transforms_stand_in  # type: ignore[attr-defined]
    sys.modules["torchvision"] = torchvision
    sys.modules["torchvision.transforms"] = transforms_stand_in


if __name__ == "__main__":
    main(sys.argv[1:])
