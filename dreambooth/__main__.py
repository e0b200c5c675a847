"""Fine-tune Stable Diffusion on a few pictures of one subject, and draw with the result."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from dreambooth import __version__
from dreambooth.process import addresses, failure, logs
from dreambooth.settings import hyperparameter_text
from dreambooth.settings.command_line import Parser
from dreambooth.settings.knob import BASE_SENTENCE, PREDICTION_TYPE_SENTENCE, PREDICTION_TYPES


def main(argv: Sequence[str]) -> int:
    """Run one verb and return its exit code.

    0 done, 1 error, 2 a verb that has moved, 130 stopped by SIGINT; `train` returns the code of
    `run_job`.
    """
    with logs.fault_tolerant_streams("stderr"):
        try:
            if argv and argv[0] == "train":  # its options come from the table of hyperparameters
                from dreambooth.job.run import run_job

                return run_job(argv[1:], os.environ, is_process=True)
            with logs.stdout_faults_told():
                return _main(argv)
        except KeyboardInterrupt:
            print("stopped by SIGINT", file=sys.stderr)
            return 130
        except Exception as error:  # the command's end: a sentence, or the trace of a bug of ours
            known = failure.for_the_user(error)
            print(f"error: {known}" if known else logs.trace_of(error), file=sys.stderr)
            return 1


def _main(argv: Sequence[str]) -> int:
    if argv and argv[0] in MOVED:
        print(f"error: {argv[0]} has moved: {MOVED[argv[0]]}.", file=sys.stderr)
        return 2
    arguments = parser().parse_args(argv)
    logs.to_stderr("info")  # what is read of a single file, what is not, and why
    return _run(arguments)


# Verbs of earlier versions that have left the package, and what to run instead.
MOVED = {
    "benchmark": "benchmarks are run as `python -m benchmarks NAME` in a checkout of the project",
}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, with one sub-command per verb."""
    from dreambooth.commands import demo, runs
    from dreambooth.settings import (
        evaluate_options,
        generate_options,
        serve_options,
        studio_options,
    )

    made = Parser(prog="python -m dreambooth", description=__doc__)
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
    evaluate_options.add_arguments(
        verbs.add_parser("evaluate", help="measure what a fine-tuned model draws and has kept")
    )
    serve_options.add_arguments(
        verbs.add_parser("serve", help="answer requests for pictures over HTTP")
    )
    runs.add_arguments(
        verbs.add_parser(
            "runs", help="list runs; start, stop, continue, repeat and delete them; choose a state"
        )
    )
    studio_options.add_arguments(
        verbs.add_parser("studio", help="open a page on which runs are made and watched")
    )
    table = verbs.add_parser("hyperparameters", help="print the table of hyperparameters")
    table.add_argument("--format", choices=("text", "json", "markdown"), default="text")
    convert = verbs.add_parser(
        "convert", help="make a folder in safetensors, or one file, of a model"
    )
    convert.add_argument("source", metavar="MODEL", help="model folder, tarball or single file")
    convert.add_argument(
        "destination",
        metavar="OUT",
        help="new model folder, or one file if it ends in .safetensors",
    )
    convert.add_argument(
        "--prediction_type", choices=PREDICTION_TYPES, help=PREDICTION_TYPE_SENTENCE
    )
    convert.add_argument("--base", metavar="FOLDER", help=BASE_SENTENCE)
    convert.add_argument(
        "--precision", choices=("fp32", "fp16"), help="float type of the one file; else as it is"
    )
    pack = verbs.add_parser("pack", help="make the model.tar.gz that an endpoint is made from")
    pack.add_argument("model", metavar="MODEL", help="model folder, tarball, or `tiny`")
    pack.add_argument("archive", metavar="OUT.tar.gz", help="new archive")
    pack.add_argument(
        "--with_code",
        action="store_true",
        help="add code/, with which SageMaker's inference toolkits run our inference.py",
    )
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
        from dreambooth.model_folder import conversion

        destination = addresses.to_path(arguments.destination, "OUT")
        conversion.convert(
            arguments.source,
            destination,
            prediction_type=arguments.prediction_type,
            base=arguments.base,
            precision=arguments.precision,
        )
        print(destination)
        return 0
    if arguments.verb == "pack":
        from dreambooth.model_folder import pack

        archive = addresses.to_path(arguments.archive, "OUT.tar.gz")
        pack.write(arguments.model, archive, with_code=arguments.with_code)
        print(archive)
        return 0
    if arguments.verb == "generate":
        from dreambooth.commands import generate

        return generate.main(arguments)
    if arguments.verb == "evaluate":
        from dreambooth.commands import evaluate

        return evaluate.main(arguments)
    if arguments.verb == "runs":
        from dreambooth.commands import runs

        return runs.main(arguments)
    if arguments.verb == "studio":
        from dreambooth.settings import studio_options
        from dreambooth.studio import start

        settings = studio_options.read(arguments, os.environ)
        os.environ.pop(studio_options.PASSWORD, None)  # what this process starts needs none
        return start.run(settings)
    if arguments.verb == "serve":
        from dreambooth.serving.http import server
        from dreambooth.settings import serve_options

        return server.run(serve_options.read(arguments, os.environ))
    from dreambooth.commands import demo

    return demo.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
