"""Find the paths, channels and raw settings of a training job.

A job is started by a plain command line, in SageMaker's script mode (arguments and ``SM_*``
variables) or in a SageMaker container (files under ``/opt/ml``). Precedence of every setting:
argument > ``SM_*`` variable > file under the root > default (`sources`). Only the arguments, the
environment and the root's own files are read. Hyperparameters stay raw; `hyperparameters` parses
them. Paths: AWS, "How Amazon SageMaker AI provides training information".
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Final

from dreambooth.errors import HyperparameterError, UserError, quoted
from dreambooth.limits import LIMITS, Limits
from dreambooth.process import addresses
from dreambooth.settings import command_line, hyperparameters, sources, ways_in
from dreambooth.settings.knob import BARE_FLAG, Knob, is_unset, knobs_of, option
from dreambooth.settings.sources import DRY_RUN, LOG_LEVEL, LOG_LEVELS
from dreambooth.settings.ways_in import RUN_DIR, Way, WaysIn

DEFAULT_ROOT: Final = "/opt/ml"
RUN_FOLDERS: Final[Mapping[str, str]] = {
    "model_dir": "model",
    "output_data_dir": ".",
    "checkpoint_dir": "checkpoints",
}
"""Where the output folders of a run lie in its folder."""
_BASE: Final = "SAGEMAKER_BASE_DIR"
_HOST: Final = "[A-Za-z0-9._:-]{1,253}"  # a name or an address
_INTERFACE: Final = "[^/\\s]{1,15}"  # as Linux names them

# The platform alone names this folder: no option is called so, with a blank.
_MODEL_CHANNEL: Final = Knob(
    name="model channel",
    kind="Path",
    default=None,
    sentence="Folder of the model to start from.",
    variables=("SM_CHANNEL_MODEL",),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hosts:
    """The hosts of one job, in an order that all of them share.

    names: two or more; none where the job has one host. current: the place of this host among them.
    interface: the network interface that they share, where the platform names one.
    """

    names: tuple[str, ...] = ()
    current: int = 0
    interface: str | None = None

    @property
    def count(self) -> int:
        """Return the number of hosts."""
        return max(1, len(self.names))

    @property
    def is_first(self) -> bool:
        """Return whether this host is the first, whose main process alone writes results."""
        return self.current == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """The paths of a job, none of which is created here, and its raw settings.

    `settings` holds hyperparameters and unknown names, but not the options that have fields here.
    `ways_in` says how its folders are given. `hosts`: those that a platform starts for one job.
    `warnings` are whole sentences about addresses that are not used as they were given.
    """

    root: Path
    training: Path = option(
        MISSING,
        "Folder with the instance images and dataset_info.json.",
        name="train",
        variables=("SM_CHANNEL_TRAINING",),
    )
    model_channel: Path | None
    model_dir: Path = option(MISSING, "Folder for the trained model.", variables=("SM_MODEL_DIR",))
    output_data_dir: Path = option(
        MISSING,
        "Folder for metrics, report and sample pictures.",
        variables=("SM_OUTPUT_DATA_DIR",),
    )
    failure_file: Path
    checkpoint_dir: Path | None = option(
        None, "Folder for checkpoints, from which a stopped run goes on."
    )
    run_dir: Path | None = option(
        None,
        "Folder of the run, in place of the three above: settings, log, metrics, model, how it "
        "ended.",
    )
    settings: Mapping[str, object]
    dry_run: bool = option(False, "Prints the plan and stops.")
    log_level: str = option(
        "info", "What the log holds.", choices=LOG_LEVELS, variables=("SM_LOG_LEVEL",)
    )
    ways_in: WaysIn = field(default_factory=WaysIn)
    hosts: Hosts = field(default_factory=Hosts)
    warnings: tuple[str, ...] = ()


OPTIONS: Final = knobs_of(Environment)
_NAMES: Final = frozenset(knob.name for knob in OPTIONS)


def read(
    argv: Sequence[str],
    environ: Mapping[str, str],
    *,
    saved: Mapping[str, object] = MappingProxyType({}),
    limits: Limits = LIMITS,
) -> Environment:
    """Read a job's environment from its arguments (without the program's name) and variables.

    saved: settings in the run's folder; each counts as an argument that is not given. Unknown
    options end up in ``settings``, so that parsing warns about them. Raises HyperparameterError for
    stray words, unusable paths and an unreadable hyperparameters.json; it then names every wrong
    hyperparameter as well. ``--help`` prints the help and raises SystemExit(0).
    """
    if _asks_for_help(argv):
        parser().print_help()
        raise SystemExit(0)
    given = _Given.read(argv, environ, saved, limits)
    root, chosen, faults = given.root, given.chosen, given.faults
    named_channel = chosen.value(_MODEL_CHANNEL.name)
    channel = named_channel or root / "input" / "data" / "model"
    checkpoints = chosen.value("checkpoint_dir")
    if checkpoints is None and (root / "checkpoints").is_dir():
        checkpoints = root / "checkpoints"
    environment = Environment(
        root=root,
        training=chosen.value("train") or root / "input" / "data" / "training",
        model_channel=channel if named_channel or channel.exists() else None,
        model_dir=chosen.value("model_dir") or root / "model",
        output_data_dir=chosen.value("output_data_dir") or _default_output(chosen, root),
        failure_file=failure_file(environ),
        checkpoint_dir=checkpoints,
        run_dir=chosen.value(RUN_DIR),
        settings=given.settings,
        dry_run=chosen.value(DRY_RUN) or False,
        log_level=chosen.value(LOG_LEVEL) or "info",
        ways_in=_ways_in(chosen, given.arguments, environ, root),
        hosts=read_hosts(environ, limits=limits),
    )
    if environment.run_dir is not None:
        environment = _in_run_folder(environment, given)
    if faults:
        faults = list(dict.fromkeys(faults))
        raise HyperparameterError([*faults, *_wrong_hyperparameters(given.settings, limits)])
    return replace(environment, warnings=_set_aside(chosen, environment))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Given:
    """What the sources of a job give. settings: of all sources, without the options."""

    root: Path
    arguments: Mapping[str, object]
    settings: Mapping[str, object]
    chosen: sources.OptionValues
    faults: list[str]

    @classmethod
    def read(
        cls,
        argv: Sequence[str],
        environ: Mapping[str, str],
        saved: Mapping[str, object],
        limits: Limits,
    ) -> _Given:
        faults: list[str] = []
        root = _root(environ, faults)
        arguments = {**saved, **sources.from_arguments(argv, faults)}
        variables = sources.from_variables(environ, faults, limits)
        file = sources.from_file(root / "input" / "config" / "hyperparameters.json", faults, limits)
        chosen = sources.OptionValues(
            (*OPTIONS, _MODEL_CHANNEL),
            *(arguments, variables, environ, file, faults),
            in_container=_is_container(root),
        )
        settings = {
            name: value
            for name, value in {**file, **variables, **arguments}.items()
            if name not in _NAMES
        }
        return cls(root=root, arguments=arguments, settings=settings, chosen=chosen, faults=faults)


def run_dir(argv: Sequence[str], environ: Mapping[str, str]) -> tuple[Path | None, bool]:
    """Return the folder of the run, None without one, and whether the job is recorded there.

    Neither a dry run nor the help is. Never raises: `read` names what is wrong.
    """
    chosen = _Given.read(argv, environ, {}, LIMITS).chosen
    folder: Path | None = chosen.value(RUN_DIR)
    return folder, not (chosen.value(DRY_RUN) or _asks_for_help(argv))


def to_save(
    argv: Sequence[str], environ: Mapping[str, str], saved: Mapping[str, object]
) -> dict[str, object]:
    """Return the settings with which `read` gives this job again, from a run's folder alone.

    Wrong ones are among them. Never raises.
    """
    given = _Given.read(argv, environ, saved, LIMITS)
    found: dict[str, object] = {}
    for name in ("train", LOG_LEVEL):
        if (raw := given.chosen.raw(name)) is not None:
            found[name] = raw
    for name, value in given.settings.items():
        if not hyperparameters.is_platform_name(name):
            found[name] = True if value is BARE_FLAG else value
    return found


def _in_run_folder(environment: Environment, given: _Given) -> Environment:
    """Return the environment with the output folders of a run; arguments for others are faults.

    The platform names its own folders in every job, so what it names is no fault.
    """
    folder = environment.run_dir
    assert folder is not None
    given.faults.extend(
        f"--{name} does not go with --{RUN_DIR}: the run's folder holds all that is written."
        for name in sources.OUTPUTS
        if not is_unset(given.arguments.get(name))
    )
    ways: dict[str, Way] = {**environment.ways_in.ways, **dict.fromkeys(RUN_FOLDERS, "run")}
    return replace(
        environment,
        **{name: folder / place for name, place in RUN_FOLDERS.items()},  # type: ignore[arg-type]
        ways_in=replace(environment.ways_in, ways=ways),
    )


def _set_aside(chosen: sources.OptionValues, environment: Environment) -> tuple[str, ...]:
    """Return one warning per unused address, which names the folder that is written instead."""
    return tuple(
        f"{name} is the address {quoted(address)}: a container writes into the platform's folder, "
        "which SageMaker copies away, and it is "
        f"{getattr(environment, name) or 'none here (checkpoint_s3_uri asks for one)'}."
        for name, address in chosen.set_aside.items()
    )


def _ways_in(
    chosen: sources.OptionValues,
    arguments: Mapping[str, object],
    environ: Mapping[str, str],
    root: Path,
) -> WaysIn:
    """Return how the folders are given; what no source gives is the platform's in a container.

    Elsewhere an option outranks the variable that gave an output folder.
    """
    channels, pipes = ways_in.channels_in(root / "input" / "data", environ)
    in_container = _is_container(root)
    channel: Way = "platform" if in_container or channels else "option"
    ways: dict[str, Way] = {
        "train": chosen.way("train") or channel,
        ways_in.MODEL: "option" if "pretrained_model" in arguments else channel,
    }
    for name in sources.OUTPUTS:
        way = chosen.way(name) or "platform"
        ways[name] = "option" if way == "platform" and not in_container else way
    return WaysIn(
        ways=ways,
        channels=channels,
        pipes=pipes,
    )


def _is_container(root: Path) -> bool:
    return (root / "input").is_dir()


def read_hosts(environ: Mapping[str, str], *, limits: Limits = LIMITS) -> Hosts:
    """Return the job's hosts: those of SM_HOSTS, else those of resourceconfig.json.

    Never raises: where they do not name several hosts and this one among them, it is the only one.
    """
    path = _root(environ, []) / "input" / "config" / "resourceconfig.json"
    config = sources.from_file(path, [], limits)
    current, names = config.get("current_host"), config.get("hosts")
    interface = environ.get("SM_NETWORK_INTERFACE_NAME") or config.get("network_interface_name")
    if environ.get("SM_HOSTS"):
        current = environ.get("SM_CURRENT_HOST")
        with contextlib.suppress(ValueError, RecursionError):
            names = json.loads(environ["SM_HOSTS"])
    if not isinstance(interface, str) or not re.fullmatch(_INTERFACE, interface):
        interface = None
    if not isinstance(names, list) or len(names) < 2 or current not in names:
        return Hosts(interface=interface)
    if not all(isinstance(name, str) and re.fullmatch(_HOST, name) for name in names):
        return Hosts(interface=interface)
    return Hosts(names=tuple(names), current=names.index(current), interface=interface)


def failure_file(environ: Mapping[str, str]) -> Path:
    """Return where SageMaker reads the reason of a failure: ``<root>/output/failure``."""
    return _root(environ, []) / "output" / "failure"


def parser() -> argparse.ArgumentParser:
    """Return the parser that prints ``--help``: paths first, then every hyperparameter."""
    made = argparse.ArgumentParser(
        prog="transfer_learning.py",
        description="Fine-tune Stable Diffusion on a few pictures of one subject. Options may be "
        "written with - or _; unknown ones are ignored with a warning.",
        allow_abbrev=False,
    )
    made.usage = "%(prog)s --train FOLDER --pretrained-model MODEL --model_dir FOLDER [options]"
    command_line.add_arguments(made, (*OPTIONS, *hyperparameters.KNOBS))
    return made


def _root(environ: Mapping[str, str], faults: list[str]) -> Path:
    """Return the root; if the variable is no path, tell the fault and return the default one."""
    try:
        return addresses.to_path(environ.get(_BASE, "").strip() or DEFAULT_ROOT, _BASE)
    except UserError as error:
        faults.append(str(error))
        return Path(DEFAULT_ROOT)


def _default_output(chosen: sources.OptionValues, root: Path) -> Path:
    """Return ``<root>/output/data`` in a container and in script mode, else beside the model.

    A root without ``input`` is no container; there a model_dir given by the user outranks the
    platform's variable.
    """
    model_dir = chosen.value("model_dir") or root / "model"
    if _is_container(root) or chosen.is_platforms("model_dir"):
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
