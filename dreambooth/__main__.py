"""`python -m dreambooth VERB`: one verb per thing that a user does."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dreambooth import __version__, hyperparameter_text, logs
from dreambooth.errors import DreamBoothError


def main(argv: Sequence[str]) -> int:
    """Run one verb; returns the exit code (1 after an error, 130 where SIGINT stopped it)."""
    try:
        if argv and argv[0] == "train":  # its options are the table of hyperparameters
            from dreambooth import job

            return job.run(argv[1:], os.environ)
        arguments = parser().parse_args(argv)
        logs.to_stderr("warning")
        return _run(arguments)
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `... | head` has read enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 0
    except DreamBoothError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    """The command line: one sub-command per verb."""
    from dreambooth import demo, generate_options

    made = argparse.ArgumentParser(prog="python -m dreambooth", description=__doc__)
    made.add_argument("--version", action="version", version=__version__)
    verbs = made.add_subparsers(dest="verb", required=True, metavar="VERB")
    demo.add_arguments(
        verbs.add_parser(
            "demo", help="fine-tune the embedded model on eight pictures, draw a sheet"
        )
    )
    verbs.add_parser("train", help="fine-tune a model (as transfer_learning.py)", add_help=False)
    generate_options.add_arguments(
        verbs.add_parser("generate", help="draw pictures from a model folder")
    )
    table = verbs.add_parser("hyperparameters", help="print the table of hyperparameters")
    table.add_argument("--format", choices=("text", "json", "markdown"), default="text")
    convert = verbs.add_parser("convert", help="turn old .bin weights into safetensors")
    convert.add_argument("source", type=Path, metavar="IN", help="model folder or tarball")
    convert.add_argument("destination", type=Path, metavar="OUT", help="new model folder")
    return made


def _run(arguments: argparse.Namespace) -> int:
    if arguments.verb == "hyperparameters":
        printers = {
            "text": hyperparameter_text.as_text,
            "json": hyperparameter_text.as_json,
            "markdown": hyperparameter_text.as_markdown,
        }
        print(printers[arguments.format]().rstrip("\n"))
        return 0
    if arguments.verb == "convert":
        from dreambooth.diffusion import weights

        weights.convert(arguments.source, arguments.destination)
        print(arguments.destination)
        return 0
    if arguments.verb == "generate":
        from dreambooth import generate

        return generate.main(arguments)
    from dreambooth import demo

    return demo.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
