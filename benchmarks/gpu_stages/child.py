"""Run one stage in this process: `python -m benchmarks.gpu_stages.child STAGE CONTEXT`.

CONTEXT is what `StageContext.to_json` writes. The process ends itself, with all that it started,
when its standard input ends: then the process that started it is gone, and with it the time limit.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence

from benchmarks.gpu_stages.facts import FactFile
from benchmarks.gpu_stages.running import StageContext
from dreambooth.errors import ResourceError
from dreambooth.process import logs

StageFunction = Callable[[StageContext, FactFile], None]

# The module of each stage; it has a function of the stage's name.
_MODULES = {
    "ceilings": "ceilings",
    "model": "whole_jobs",
    "steps": "step_trials",
    "graphs": "checks",
    "learning": "checks",
    "job": "whole_jobs",
    "serving": "serving",
    "t4": "whole_jobs",
    "peer": "whole_jobs",
    "levers": "step_trials",
    "memory": "checks",
}


def main(argv: Sequence[str]) -> int:
    """Run the stage that `argv` names; return 1 after an error, which becomes a fact."""
    name, context = argv[0], StageContext.from_json(argv[1])
    threading.Thread(target=_end_with_the_input, daemon=True).start()
    logs.to_stderr("info")
    return run(name, context)


def run(name: str, context: StageContext) -> int:
    """Run a stage; return 0, or 1 after an error."""
    facts = FactFile(context.out, name)
    try:
        if not context.dry:
            _refuse_cpu()
        function(name)(context, facts)
    except Exception as error:  # whatever it is, the other stages go on
        text = " ".join(f"{type(error).__name__}: {error}".split())
        facts.add("error", name, error=text[:500], trace=traceback.format_exc()[-3000:])
        return 1
    return 0


def function(name: str) -> StageFunction:
    """Return the function of a stage; its module loads torch."""
    module = importlib.import_module(f"benchmarks.gpu_stages.{_MODULES[name]}")
    found: StageFunction = getattr(module, name)
    return found


def _refuse_cpu() -> None:
    """Raise ResourceError without a GPU that torch can use: at full size a CPU takes hours."""
    import torch

    if not torch.cuda.is_available():
        raise ResourceError(
            f"torch {torch.__version__} (CUDA {torch.version.cuda}) can use no GPU here."
        )


def _end_with_the_input() -> None:
    os.read(sys.stdin.fileno(), 1)  # a buffered read would block the interpreter's end
    os.killpg(0, signal.SIGKILL)  # this process leads the group


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
