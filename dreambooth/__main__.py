"""`python -m dreambooth VERB`: one verb per thing that a user does."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from dreambooth import __version__, addresses, hyperparameter_text, logs
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
    except Exception as error:  # the border: a fault of ours, told as a log tells it
        print(logs.trace_of(error), file=sys.stderr)
        return 1


BENCHMARKS = {
    "probes": "hurt a server in every way; nothing may take it down",
    "serving": "serve under load: serially, by whole requests, step by step",
    "startup": "how long a user waits before anything happens",
    "survive": "kill a training run again and again; it must lose nothing",
    "train": "training runs: step time, memory, time to first step; beside a peer's script",
}


def parser() -> argparse.ArgumentParser:
    """The command line: one sub-command per verb."""
    from dreambooth import demo, generate_options
    from dreambooth.serving import serve_options
    from dreambooth.tiny import evaluate

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
    serve_options.add_arguments(
        verbs.add_parser("serve", help="answer requests for pictures over HTTP")
    )
    evaluate.add_arguments(
        verbs.add_parser("evaluate", help="judge what a model of the embedded world draws")
    )
    table = verbs.add_parser("hyperparameters", help="print the table of hyperparameters")
    table.add_argument("--format", choices=("text", "json", "markdown"), default="text")
    convert = verbs.add_parser("convert", help="turn old .bin weights into safetensors")
    convert.add_argument("source", metavar="IN", help="model folder or tarball")
    convert.add_argument("destination", metavar="OUT", help="new model folder")
    pack = verbs.add_parser("pack", help="make the model.tar.gz that an endpoint is made from")
    pack.add_argument("model", metavar="MODEL", help="model folder, tarball, or `tiny`")
    pack.add_argument("archive", metavar="OUT.tar.gz", help="new archive")
    pack.add_argument(
        *("--with-code", "--with_code"),
        action="store_true",
        help="add code/, with which SageMaker's inference toolkits run our inference.py",
    )
    named = verbs.add_parser("benchmark", help="measure").add_subparsers(
        dest="benchmark", required=True, metavar="NAME"
    )
    for name, told in BENCHMARKS.items():
        _benchmark(name).add_arguments(named.add_parser(name, help=told))
    return made


def _benchmark(name: str) -> Any:
    return importlib.import_module(f"dreambooth.benchmarks.{name}")


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

        destination = addresses.to_path(arguments.destination, "OUT")
        weights.convert(arguments.source, destination)
        print(destination)
        return 0
    if arguments.verb == "benchmark":
        code: int = _benchmark(arguments.benchmark).main(arguments)
        return code
    if arguments.verb == "pack":
        from dreambooth import pack

        archive = addresses.to_path(arguments.archive, "OUT.tar.gz")
        pack.write(arguments.model, archive, with_code=arguments.with_code)
        print(archive)
        return 0
    if arguments.verb == "generate":
        from dreambooth import generate

        return generate.main(arguments)
    if arguments.verb == "serve":
        from dreambooth.serving import serve_options, server

        return server.run(serve_options.read(arguments, os.environ))
    if arguments.verb == "evaluate":
        from dreambooth.tiny import evaluate

        return evaluate.main(arguments)
    from dreambooth import demo

    return demo.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
