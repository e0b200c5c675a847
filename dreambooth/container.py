"""The contract with the world around a training job: paths, channels, raw settings.

A job is started by a plain command line, in SageMaker's script mode (arguments and ``SM_*``
variables) or in a SageMaker container (files under ``/opt/ml``). Precedence of every setting:
argument > ``SM_*`` variable > file under the root > default. Nothing is read but the arguments,
the environment and the root's own files; values stay raw, :mod:`dreambooth.hyperparameters`
parses them. Paths and files: AWS, "How Amazon SageMaker AI provides training information".
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dreambooth import hyperparameter_text, hyperparameters
from dreambooth.errors import HyperparameterError
from dreambooth.knob import BARE_FLAG
from dreambooth.limits import LIMITS, Limits

DEFAULT_ROOT: Final = "/opt/ml"
LOG_LEVELS: Final = ("debug", "info", "warning", "error", "critical")

_PATH_OPTIONS: Final = {
    "train": "folder with the instance images and dataset_info.json",
    "model_dir": "folder for the trained model",
    "output_data_dir": "folder for metrics, report and sample pictures",
    "checkpoint_dir": "folder for checkpoints, from which a stopped run goes on",
}
_LOG_LEVEL: Final = "log_level"
_DRY_RUN: Final = "dry_run"


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """Where a job reads and writes, and its settings as they came; nothing is created by it."""

    root: Path
    training: Path
    model_channel: Path | None
    model_dir: Path
    output_data_dir: Path
    failure_file: Path
    checkpoint_dir: Path | None
    settings: Mapping[str, object]
    dry_run: bool
    log_level: str
    num_gpus: int | None
    in_container: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Arguments:
    """A command line, sorted: options that name hyperparameters or nothing known are settings."""

    options: Mapping[str, object]
    settings: Mapping[str, object]
    faults: tuple[str, ...]


def read(
    argv: Sequence[str], environ: Mapping[str, str], *, limits: Limits = LIMITS
) -> Environment:
    """The job's environment from its arguments (without the program's name) and variables.

    Options that nobody knows end up in ``settings``, so that parsing them warns. Raises
    HyperparameterError, together with every wrong hyperparameter, for stray words and an
    unreadable hyperparameters.json. ``--help`` prints the help and raises SystemExit(0).
    """
    if _asks_for_help(argv):
        parser().print_help()
        raise SystemExit(0)
    arguments = _read_arguments(argv)
    root = _root(environ)
    faults = list(arguments.faults)
    settings = {
        **_from_file(root / "input" / "config" / "hyperparameters.json", faults, limits),
        **_from_variables(environ, faults, limits),
        **arguments.settings,
    }
    dry_run = _dry_run(arguments.options, faults)
    log_level = _log_level(arguments.options, environ, faults)
    if faults:
        raise HyperparameterError([*faults, *_wrong_hyperparameters(settings, limits)])

    in_container = (root / "input").is_dir() or any(name.startswith("SM_") for name in environ)

    def path(option: str, variable: str, default: Path) -> Path:
        chosen = arguments.options.get(option) or environ.get(variable)
        return Path(os.path.expanduser(str(chosen))) if chosen else default

    model_dir = path("model_dir", "SM_MODEL_DIR", root / "model")
    output = root / "output" / "data" if in_container else _beside(model_dir)
    channel = path("", "SM_CHANNEL_MODEL", root / "input" / "data" / "model")
    checkpoints = path("checkpoint_dir", "", root / "checkpoints")
    return Environment(
        root=root,
        training=path("train", "SM_CHANNEL_TRAINING", root / "input" / "data" / "training"),
        model_channel=channel if channel.exists() or environ.get("SM_CHANNEL_MODEL") else None,
        model_dir=model_dir,
        output_data_dir=path("output_data_dir", "SM_OUTPUT_DATA_DIR", output),
        failure_file=failure_file(environ),
        checkpoint_dir=(
            checkpoints if arguments.options.get("checkpoint_dir") or checkpoints.is_dir() else None
        ),
        settings=settings,
        dry_run=dry_run,
        log_level=log_level,
        num_gpus=_count(environ.get("SM_NUM_GPUS", "")),
        in_container=in_container,
    )


def failure_file(environ: Mapping[str, str]) -> Path:
    """Where SageMaker looks for the reason of a failure: ``<root>/output/failure``."""
    return _root(environ) / "output" / "failure"


def describe_missing_training(environment: Environment) -> str:
    """The sentence for a job whose training folder does not exist."""
    return (
        f"There is no training folder {environment.training}: give the folder with the instance "
        "images and dataset_info.json with --train, or as the channel called training."
    )


def parser() -> argparse.ArgumentParser:
    """The command line as ``--help`` shows it: paths, then every hyperparameter."""
    made = argparse.ArgumentParser(
        prog="transfer_learning.py",
        description="Fine-tune Stable Diffusion on a few pictures of one subject. Options may be "
        "written with - or _; unknown ones are ignored with a warning.",
        allow_abbrev=False,
    )
    made.usage = "%(prog)s --train FOLDER --pretrained-model MODEL --model_dir FOLDER [options]"
    for name, told in _PATH_OPTIONS.items():
        made.add_argument(f"--{name}", metavar="FOLDER", help=told)
    made.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    made.add_argument(
        "--log_level", metavar="LEVEL", help=f"{', '.join(LOG_LEVELS)} (default: info)"
    )
    hyperparameter_text.add_arguments(made)
    return made


def _root(environ: Mapping[str, str]) -> Path:
    return Path(environ.get("SAGEMAKER_BASE_DIR") or DEFAULT_ROOT)


def _beside(model_dir: Path) -> Path:
    """``model`` -> ``model-output``, also for a folder that is given as ``.`` or ``..``."""
    if model_dir.name in ("", ".."):
        model_dir = Path(os.path.abspath(model_dir))
    return model_dir.with_name(f"{model_dir.name}-output") if model_dir.name else Path("/output")


def _count(text: str) -> int | None:
    return int(text) if re.fullmatch("[0-9]{1,6}", text) else None


# Settings


def _asks_for_help(argv: Sequence[str]) -> bool:
    return "-h" in argv or "--help" in argv


def _read_arguments(argv: Sequence[str]) -> _Arguments:
    """Sort a command line without refusing names: ``--x v``, ``--x=v`` and the bare ``--x``.

    argparse is not used here: it takes ``-1e-6`` for an option, and cannot tell which value
    belonged to an option that it does not know.
    """
    options: dict[str, object] = {}
    settings: dict[str, object] = {}
    faults: list[str] = []
    words = list(reversed(argv))
    while words:
        word = words.pop()
        if not re.match("--[A-Za-z_]", word):
            faults.append(f"The argument {word[:60]!r} belongs to no option.")
            continue
        spelled, equals, value = word.partition("=")
        name = hyperparameters.normalised(spelled)
        given: object = value
        if not equals:
            given = BARE_FLAG
            if words and not words[-1].startswith("--") and _takes(name, words[-1]):
                given = words.pop()
        known = name in _PATH_OPTIONS or name in (_LOG_LEVEL, _DRY_RUN)
        if known and given is BARE_FLAG and name != _DRY_RUN:
            faults.append(f"--{name} needs a value.")
        (options if known else settings)[name] = given
    return _Arguments(options=options, settings=settings, faults=tuple(faults))


def _takes(name: str, word: str) -> bool:
    """Whether a word is an option's value; after ``--dry-run`` only True or False is."""
    return name != _DRY_RUN or word.lower() in ("true", "false", "")


def _from_variables(
    environ: Mapping[str, str], faults: list[str], limits: Limits
) -> dict[str, object]:
    """``SM_HPS`` (one JSON object), then ``SM_HP_<NAME>`` (one value each)."""
    whole = environ.get("SM_HPS", "")
    settings = _from_json(whole, "The variable SM_HPS", faults, limits) if whole.strip() else {}
    for variable, value in environ.items():
        if variable.startswith("SM_HP_"):
            settings[hyperparameters.normalised(variable[len("SM_HP_") :]).lower()] = value
    return settings


def _from_file(path: Path, faults: list[str], limits: Limits) -> dict[str, object]:
    """SageMaker's hyperparameters.json, where there is one."""
    if not path.exists():
        return {}
    told = f"The file {path}"
    if not path.is_file():
        faults.append(f"{told} is not a regular file.")
        return {}
    try:
        with path.open("rb") as file:
            data = file.read(limits.max_hyperparameters_bytes + 1)
        text = data.decode("utf-8-sig")
    except OSError as error:
        faults.append(f"{told} cannot be read: {error.strerror}.")
        return {}
    except UnicodeDecodeError:
        faults.append(f"{told} is not UTF-8 text.")
        return {}
    return _from_json(text, told, faults, limits)


def _from_json(text: str, told: str, faults: list[str], limits: Limits) -> dict[str, object]:
    """One flat JSON object; numbers stay text, so that no digit is lost before parsing."""
    if len(text) > limits.max_hyperparameters_bytes:
        faults.append(f"{told} is longer than {limits.max_hyperparameters_bytes} bytes.")
        return {}
    try:
        found = json.loads(text, parse_int=str, parse_float=str, parse_constant=str)
    except (ValueError, RecursionError) as error:
        where = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        faults.append(f"{told} is not valid JSON{where}.")
        return {}
    if not isinstance(found, dict):
        faults.append(f"{told} must hold one JSON object of names and values.")
        return {}
    return {hyperparameters.normalised(name): value for name, value in found.items()}


def _wrong_hyperparameters(settings: Mapping[str, object], limits: Limits) -> tuple[str, ...]:
    try:
        hyperparameters.parse(settings, limits=limits)
    except HyperparameterError as error:
        return error.faults
    return ()


def _dry_run(options: Mapping[str, object], faults: list[str]) -> bool:
    given = options.get(_DRY_RUN, "False")
    if given is BARE_FLAG:
        return True
    text = str(given).lower()
    if text not in ("true", "false", ""):
        faults.append(f"--dry-run must be True or False, not {text[:60]!r}.")
    return text == "true"


def _log_level(options: Mapping[str, object], environ: Mapping[str, str], faults: list[str]) -> str:
    """A name of LOG_LEVELS; SageMaker gives numbers (``SM_LOG_LEVEL=20``)."""
    given = options.get(_LOG_LEVEL)
    level = str(given or environ.get("SM_LOG_LEVEL") or "info").lower()
    if re.fullmatch("[1-5]0", level):
        level = LOG_LEVELS[int(level) // 10 - 1]
    if level in LOG_LEVELS:
        return level
    if isinstance(given, str):
        faults.append(f"--log_level must be one of {', '.join(LOG_LEVELS)}, not {given[:60]!r}.")
    return "info"
