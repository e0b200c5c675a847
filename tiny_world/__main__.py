"""Run one of the tools that make and evaluate the embedded model: `python -m tiny_world NAME`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from dreambooth.errors import DreamBoothError

NAMES = {
    "evaluate": "what the judge reads in a model's pictures",
    "study": "run one of the published experiments: table, sheet, and its part of a page",
    "priors": "compare kinds of prior preservation over seeds: what is learned, what is forgotten",
    "stopping": "compare rules for when to stop with constant numbers of steps",
    "recipe": "train the embedded model",
    "judge": "train the judge",
    "clean": "how well clean pictures are told from others, by labels of two readers",
    "data_sets": "draw the shipped data sets",
}


def main(argv: Sequence[str]) -> int:
    """Run one of NAMES; return the exit code (1 after an error, 130 when SIGINT stopped it)."""
    if not argv or argv[0] not in NAMES:
        lines = (f"  {name:<10} {sentence}" for name, sentence in NAMES.items())
        print("usage: python -m tiny_world NAME [options]", *lines, sep="\n", file=sys.stderr)
        return 2
    try:
        code: int = importlib.import_module(f"tiny_world.{argv[0]}").main(argv[1:])
        return code
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        return 130
    except DreamBoothError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
