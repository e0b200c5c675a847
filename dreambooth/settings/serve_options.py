"""Read and check the options of `python -m dreambooth serve`, and report all faults at once.

Precedence: option > variable ``DREAMBOOTH_<NAME>`` > the platform's variable
(``SAGEMAKER_BIND_TO_PORT``, ``MMS_MAX_RESPONSE_SIZE``, ``SM_MODEL_DIR``) > default. An empty
variable counts as unset. Standard library only.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from dreambooth.errors import UserError
from dreambooth.limits import LIMITS, MIB

PREFIX: Final = "DREAMBOOTH_"
DEVICES: Final = ("auto", "cpu", "cuda")
PRECISIONS: Final = ("auto", "fp32", "fp16", "bf16")
LOG_LEVELS: Final = ("debug", "info", "warning", "error")
# What one InvokeEndpoint call may return (AWS, InvokeEndpoint: Body, 6 MB).
MAX_RESPONSE_BYTES: Final = 6 * MIB
# A day: nobody waits longer, and no timer overflows.
_LONGEST_S: Final = 86_400


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """The settings of the server; the names state the units.

    model: a folder, a tarball, a hub id or `tiny`. model_is_platforms: whether no model was named,
    so that `model` is the folder into which SageMaker unpacks one. request_timeout_s: time from its
    arrival within which a request must be answered. max_queue: pictures that wait or are drawn at
    one time, at most. batch_rows: None in the elastic mode, the fixed number of rows in the exact
    one. cuda_graphs, channels_last: for speed on a GPU; off until measured on one.
    """

    model: str
    host: str = "0.0.0.0"
    port: int = 8080
    request_timeout_s: float = 60.0
    max_queue: int = 64
    batch_rows: int | None = None
    max_response_bytes: int = MAX_RESPONSE_BYTES
    max_body_bytes: int = LIMITS.max_body_bytes
    max_connections: int = 4_096
    safety_checker: bool = True
    device: str = "auto"
    precision: str = "auto"
    cuda_graphs: bool = False
    channels_last: bool = False
    log_level: str = "info"
    model_is_platforms: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Option:
    """One option, which sets one field of ServeSettings: its spelling, parser and help.

    A flag takes no value on the command line; giving it inverts the field's default.
    """

    name: str
    field: str
    help: str
    parse: Callable[[str], object]
    want: str
    metavar: str = ""
    default: str | None = None
    platform: str | None = None
    flag: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options; their values stay strings until `read` parses them."""
    for option in _OPTIONS:
        help_ = option.help + (f" (default {option.default})" if option.default else "")
        if option.flag:
            parser.add_argument(f"--{option.name}", action="store_const", const="true", help=help_)
        else:
            parser.add_argument(f"--{option.name}", metavar=option.metavar, help=help_)


def read(arguments: argparse.Namespace, environ: Mapping[str, str]) -> ServeSettings:
    """Parse and check options and variables; raise one UserError that names all faults.

    The default model lies where SageMaker unpacks it: ``<SAGEMAKER_BASE_DIR or /opt/ml>/model``.
    """
    faults: list[str] = []
    base = environ.get("SAGEMAKER_BASE_DIR") or "/opt/ml"
    values: dict[str, object] = {}
    for option in _OPTIONS:
        spelled, text = _given(option, arguments, environ)
        if text is None:
            continue
        try:
            value = option.parse(text.strip())
        except ValueError:
            value = None
        if value is None:
            faults.append(f"{spelled} must be {option.want}, not {text[:100]!r}.")
        else:
            # `no_...` is the opposite of its field.
            values[option.field] = (not value) if option.field != option.name else value
    if faults:
        raise UserError(" ".join(faults))
    if "model" not in values:
        values |= {"model": f"{base.rstrip('/')}/model", "model_is_platforms": True}
    return ServeSettings(**values)  # type: ignore[arg-type]  # each parsed by its own option


def _given(
    option: _Option, arguments: argparse.Namespace, environ: Mapping[str, str]
) -> tuple[str, str | None]:
    """Return the option or variable that gives a value, and the value, None if none does."""
    given: str | None = getattr(arguments, option.name)
    if given is not None:
        return f"--{option.name}", given
    for variable in (PREFIX + option.name.upper(), option.platform):
        if variable and environ.get(variable, "").strip():
            return variable, environ[variable]
    return f"--{option.name}", None


def _whole(least: int, most: int) -> Callable[[str], int | None]:
    def parse(text: str) -> int | None:
        if not re.fullmatch(r"[0-9]{1,18}", text):
            return None
        return int(text) if least <= int(text) <= most else None

    return parse


def _seconds(text: str) -> float | None:
    value = float(text)
    return value if 1 <= value <= _LONGEST_S else None


def _one_of(choices: tuple[str, ...]) -> Callable[[str], str | None]:
    return lambda text: text.lower() if text.lower() in choices else None


def _yes_or_no(text: str) -> bool | None:
    return {"true": True, "1": True, "false": False, "0": False}.get(text.lower())


def _text(text: str) -> str | None:
    return text if text and text.isprintable() else None


def _number(
    name: str, range_: tuple[int, int], default: str, help_: str, platform: str | None = None
) -> _Option:
    return _Option(
        name=name,
        field=name,
        help=help_,
        parse=_whole(*range_),
        want=f"a whole number from {range_[0]} to {range_[1]}",
        metavar="N",
        default=default,
        platform=platform,
    )


def _choice(name: str, choices: tuple[str, ...], help_: str) -> _Option:
    return _Option(
        name=name,
        field=name,
        help=help_,
        parse=_one_of(choices),
        want=f"one of {', '.join(choices)}",
        metavar="|".join(choices),
        default=getattr(_DEFAULTS, name),
    )


def _switch(name: str, help_: str) -> _Option:
    return _Option(
        name=name,
        field=name.removeprefix("no_"),
        help=help_,
        parse=_yes_or_no,
        want="true or false",
        flag=True,
    )


_DEFAULTS: Final = ServeSettings(model="")
_OPTIONS: Final = (
    _Option(
        name="model",
        field="model",
        help="model folder, tarball, hub id, or `tiny`; without it the folder /opt/ml/model",
        parse=_text,
        want="the name of a model",
        metavar="MODEL",
        platform="SM_MODEL_DIR",
    ),
    _Option(
        name="host",
        field="host",
        help="address to listen on",
        parse=_text,
        want="an address",
        metavar="ADDRESS",
        default=_DEFAULTS.host,
    ),
    _number(
        *("port", (0, 65_535), str(_DEFAULTS.port)),
        "port to listen on; 0 takes a free one and logs it",
        "SAGEMAKER_BIND_TO_PORT",
    ),
    _Option(
        name="request_timeout_s",
        field="request_timeout_s",
        help="a request that cannot be done within so many seconds is refused at once",
        parse=_seconds,
        want=f"a number of seconds from 1 to {_LONGEST_S}",
        metavar="S",
        default=f"{_DEFAULTS.request_timeout_s:g}",
    ),
    _number(
        *("max_queue", (1, 100_000), str(_DEFAULTS.max_queue)),
        "the most pictures that wait or are drawn at once",
    ),
    _number(
        *("batch_rows", (2, LIMITS.max_generated_batch), ""),
        "exact mode: every U-Net call has N rows (a guided picture takes two), so that traffic "
        "changes no byte of a picture",
    ),
    _number(
        *("max_response_bytes", (1_000, 10**12), str(_DEFAULTS.max_response_bytes)),
        "longer replies are refused, those of nested lists before any work",
        "MMS_MAX_RESPONSE_SIZE",
    ),
    _number(
        *("max_connections", (1, 1_000_000), str(_DEFAULTS.max_connections)),
        "open connections; one more is answered with 503 and closed",
    ),
    _switch("no_safety_checker", "do not run the model's safety checker"),
    _choice("device", DEVICES, "where to draw; auto: a GPU where there is one"),
    _choice("precision", PRECISIONS, "auto: half precision on a GPU, fp32 else"),
    _switch(
        "cuda_graphs",
        "on a GPU, launch a U-Net call's kernels all at once; not measured on one yet",
    ),
    _switch(
        "channels_last",
        "keep the channels of convolutions last, which changes pictures by rounding; for GPUs, and "
        "not measured on one yet",
    ),
    _choice("log_level", LOG_LEVELS, "what the log holds; info: one line per request"),
)
