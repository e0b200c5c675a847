"""Run a script as `python SCRIPT` does, inside the measured process, then write its memory figures.

The command is `python -m benchmarks.train_step.child MEMORY_FILE CONDITIONS SCRIPT [ARGUMENT ...]`.
CONDITIONS is a JSON object with the fields of `conditions.Conditions`.
"""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from benchmarks.train_step import phases
from benchmarks.train_step.conditions import Conditions


def main(argv: Sequence[str]) -> None:
    """Run the script that `argv` names. Raises what the script raises."""
    memory_file, given, script, *arguments = argv
    conditions = Conditions(**json.loads(given))
    if conditions != Conditions(stand_in=conditions.stand_in):
        import torch

        conditions.impose(torch)
    if conditions.stand_in:
        _stand_in_for_torchvision()
    watch = phases.of_this_process()
    phases.listen(watch)
    sys.argv = [script, *arguments]
    try:
        with watch.polling() if shutil.which("nvidia-smi") else nullcontext():
            runpy.run_path(script, run_name="__main__")
    finally:
        Path(memory_file).write_text(json.dumps(watch.found()))


def _stand_in_for_torchvision() -> None:
    from transformers.utils import is_torchvision_available

    from benchmarks.train_step import transforms_stand_in

    # transformers checks once and keeps the answer; it must not find the stand-in.
    is_torchvision_available()
    torchvision = ModuleType("torchvision")
    torchvision.__spec__ = ModuleSpec(
        "torchvision", None
    )  # read by libraries that call `find_spec`
    torchvision.transforms = transforms_stand_in  # type: ignore[attr-defined]
    sys.modules["torchvision"] = torchvision
    sys.modules["torchvision.transforms"] = transforms_stand_in


if __name__ == "__main__":
    main(sys.argv[1:])
