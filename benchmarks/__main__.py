"""Run one benchmark by name; it prints a table and, as its last line, one JSON document."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from dreambooth.errors import DreamBoothError
from dreambooth.process import logs
from dreambooth.settings.command_line import Parser

BENCHMARKS = {
    "gpu": "all that only a GPU can show, in one call of nine minutes; a dry run on a CPU",
    "probes": "hurt a server in every way; nothing may take it down",
    "serving": "serve under load: serially, by whole requests, step by step",
    "startup": "how long a user waits before anything happens",
    "survive": "kill a training run again and again; it must lose nothing",
    "train": "training runs: step time, memory, time to first step; beside a peer's script",
}


def main(argv: Sequence[str]) -> int:
    """Run one benchmark; return the exit code (1 after an error, 130 after SIGINT)."""
    arguments = parser().parse_args(argv)
    logs.to_stderr("warning")
    try:
        code: int = _module(arguments.benchmark).main(arguments)
        return code
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        return 130
    except DreamBoothError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    """Return the command-line parser, with one sub-command per benchmark."""
    made = Parser(prog="python -m benchmarks", description=__doc__)
    names = made.add_subparsers(dest="benchmark", required=True, metavar="NAME")
    for name, sentence in BENCHMARKS.items():
        _module(name).add_arguments(names.add_parser(name, help=sentence))
    return made


def _module(name: str) -> Any:
    return importlib.import_module(f"benchmarks.{name}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
