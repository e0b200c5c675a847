"""Find the paths, channels and raw settings of a training job.

A job is started by a plain command line, in SageMaker's script mode (arguments and ``SM_*``
variables) or in a SageMaker container (files under ``/opt/ml``). Precedence of every setting:
argument > ``SM_*`` variable > file under the root > default (`sources`). Only the arguments, the
environment and the root's own files are read. Hyperparameters stay raw; `hyperparameters` parses
them. Paths: AWS, "How Amazon SageMaker AI provides training information".
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from dreambooth.errors import HyperparameterError, UserError, quoted
from dreambooth.limits import LIMITS, Limits
from dreambooth.process import addresses
from dreambooth.settings import hyperparameter_text, hyperparameters, sources
from dreambooth.settings.sources import DRY_RUN, LOG_LEVEL, LOG_LEVELS

DEFAULT_ROOT: Final = "/opt/ml"
_BASE: Final = "SAGEMAKER_BASE_DIR"

_PATH_OPTIONS: Final = {
    "train": "folder with the instance images and dataset_info.json",
    "model_dir": "folder for the trained model",
    "output_data_dir": "folder for metrics, report and sample pictures",
    "checkpoint_dir": "folder for checkpoints, from which a stopped run goes on",
}
_OPTIONS: Final = (*_PATH_OPTIONS, LOG_LEVEL, DRY_RUN)


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """The paths of a job, none of which is created here, and its raw settings.

    `settings` holds hyperparameters and unknown names, but not the options that have fields here.
    `warnings` are whole sentences about addresses that are not used as they were given.
    """

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
    warnings: tuple[str, ...] = ()


def read(
    argv: Sequence[str], environ: Mapping[str, str], *, limits: Limits = LIMITS
) -> Environment:
    """Read a job's environment from its arguments (without the program's name) and variables.

    Unknown options end up in ``settings``, so that parsing warns about them. Raises
    HyperparameterError for stray words, unusable paths and an unreadable hyperparameters.json; it
    then names every wrong hyperparameter as well. ``--help`` prints the help and raises
    SystemExit(0).
    """
    if _asks_for_help(argv):
        parser().print_help()
        raise SystemExit(0)
    root = _root(environ)
    faults: list[str] = []
    _check_root(environ, faults)
    arguments = sources.from_arguments(argv, faults)
    variables = sources.from_variables(environ, faults, limits)
    file = sources.from_file(root / "input" / "config" / "hyperparameters.json", faults, limits)
    settings = {
        name: value
        for name, value in {**file, **variables, **arguments}.items()
        if name not in _OPTIONS
    }
    chosen = sources.OptionValues(
        arguments, variables, environ, file, faults, in_container=_is_container(root)
    )
    dry_run = _dry_run(chosen.text(DRY_RUN), faults)
    log_level = _log_level(chosen.text(LOG_LEVEL), faults)
    named_channel = chosen.path(sources.MODEL_CHANNEL)
    channel = named_channel or root / "input" / "data" / "model"
    checkpoints = chosen.path("checkpoint_dir")
    if checkpoints is None and (root / "checkpoints").is_dir():
        checkpoints = root / "checkpoints"
    environment = Environment(
        root=root,
        training=chosen.path("train") or root / "input" / "data" / "training",
        model_channel=channel if named_channel or channel.exists() else None,
        model_dir=chosen.path("model_dir") or root / "model",
        output_data_dir=chosen.path("output_data_dir") or _default_output(chosen, root),
        failure_file=failure_file(environ),
        checkpoint_dir=checkpoints,
        settings=settings,
        dry_run=dry_run,
        log_level=log_level,
    )
    if faults:
        faults = list(dict.fromkeys(faults))
        raise HyperparameterError([*faults, *_wrong_hyperparameters(settings, limits)])
    return replace(environment, warnings=_set_aside(chosen, environment))


def _set_aside(chosen: sources.OptionValues, environment: Environment) -> tuple[str, ...]:
    """Return one warning per unused address, which names the folder that is written instead."""
    return tuple(
        f"{name} is the address {quoted(address)}: a container writes into the platform's folder, "
        "which SageMaker copies away, and it is "
        f"{getattr(environment, name) or 'none here (checkpoint_s3_uri asks for one)'}."
        for name, address in chosen.set_aside.items()
    )


def _is_container(root: Path) -> bool:
    return (root / "input").is_dir()


def failure_file(environ: Mapping[str, str]) -> Path:
    """Return where SageMaker reads the reason of a failure: ``<root>/output/failure``."""
    return _root(environ) / "output" / "failure"


def parser() -> argparse.ArgumentParser:
    """Return the parser that prints ``--help``: paths first, then every hyperparameter."""
    made = argparse.ArgumentParser(
        prog="transfer_learning.py",
        description="Fine-tune Stable Diffusion on a few pictures of one subject. Options may be "
        "written with - or _; unknown ones are ignored with a warning.",
        allow_abbrev=False,
    )
    made.usage = "%(prog)s --train FOLDER --pretrained-model MODEL --model_dir FOLDER [options]"
    for name, sentence in _PATH_OPTIONS.items():
        made.add_argument(f"--{name}", metavar="FOLDER", help=sentence)
    made.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    made.add_argument(
        "--log_level", metavar="LEVEL", help=f"{', '.join(LOG_LEVELS)} (default: info)"
    )
    hyperparameter_text.add_arguments(made)
    return made


def _root(environ: Mapping[str, str]) -> Path:
    """Return the root, or the default one if the variable is no path (see `_check_root`)."""
    try:
        return addresses.to_path(environ.get(_BASE, "").strip() or DEFAULT_ROOT, _BASE)
    except UserError:
        return Path(DEFAULT_ROOT)


def _check_root(environ: Mapping[str, str], faults: list[str]) -> None:
    try:
        addresses.to_path(environ.get(_BASE, "").strip() or DEFAULT_ROOT, _BASE)
    except UserError as error:
        faults.append(str(error))


def _default_output(chosen: sources.OptionValues, root: Path) -> Path:
    """Return ``<root>/output/data`` in a container and in script mode, else beside the model.

    A root without ``input`` is no container; there a model_dir given by the user outranks the
    platform's variable.
    """
    model_dir = chosen.path("model_dir") or root / "model"
    by_user = chosen.named("model_dir") is not None
    if _is_container(root) or (not by_user and chosen.platform("model_dir")):
        return root / "output" / "data"
    return _beside(model_dir)


def _beside(model_dir: Path) -> Path:
    """Turn ``model`` into ``model-output``; also accept a folder given as ``.`` or ``..``."""
    if model_dir.name in ("", ".."):
        model_dir = Path(os.path.abspath(model_dir))
    return model_dir.with_name(f"{model_dir.name}-output") if model_dir.name else Path("/output")


def _asks_for_help(argv: Sequence[str]) -> bool:
    return "-h" in argv or "--help" in argv


def _wrong_hyperparameters(settings: Mapping[str, object], limits: Limits) -> tuple[str, ...]:
    try:
        hyperparameters.parse(settings, limits=limits)
    except HyperparameterError as error:
        return error.faults
    return ()


def _dry_run(given: str | None, faults: list[str]) -> bool:
    text = (given or "False").lower()
    if text not in ("true", "false"):
        faults.append(f"{DRY_RUN} must be True or False, not {quoted(given)}.")
    return text == "true"


def _log_level(given: str | None, faults: list[str]) -> str:
    level = sources.level_of(given or "info")
    if level is None:
        faults.append(f"{LOG_LEVEL} must be one of {', '.join(LOG_LEVELS)}, not {quoted(given)}.")
    return level or "info"
