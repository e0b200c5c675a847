"""Declare the options of `python -m dreambooth serve`, once, and read them.

Precedence: option > variable ``DREAMBOOTH_<NAME>`` > the platform's variable
(``SAGEMAKER_BIND_TO_PORT``, ``MMS_MAX_RESPONSE_SIZE``, ``SM_MODEL_DIR``) > default. An empty
variable counts as unset. Standard library only.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from dreambooth.errors import HyperparameterError
from dreambooth.limits import LIMITS, MIB
from dreambooth.settings import command_line
from dreambooth.settings.knob import (
    BASE_SENTENCE,
    PREDICTION_TYPE_SENTENCE,
    PREDICTION_TYPES,
    Knob,
    knobs_of,
    option,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """The settings of the server; the names state the units.

    model_is_platforms: whether no model was named, so that `model` is the folder into which
    SageMaker unpacks one.
    """

    model: str = option(
        "/opt/ml/model",
        "Model folder, tarball, single file, hub id, or tiny (the embedded model).",
        is_printable=True,
        variables=("SM_MODEL_DIR",),
    )
    prediction_type: str | None = option(None, PREDICTION_TYPE_SENTENCE, choices=PREDICTION_TYPES)
    base: str | None = option(None, BASE_SENTENCE, is_printable=True)
    host: str = option("0.0.0.0", "Address to listen on.", is_printable=True)
    port: int = option(
        8080,
        "Port to listen on; 0 takes a free one and logs it.",
        minimum=0,
        maximum=65_535,
        variables=("SAGEMAKER_BIND_TO_PORT",),
    )
    request_timeout_s: float = option(
        60.0,
        "A request that cannot be answered within so many seconds is refused at once.",
        minimum=1,
        maximum=86_400,  # a day: nobody waits longer, and no timer overflows
    )
    max_queue: int = option(
        64, "Pictures that wait or are drawn at one time, at most.", minimum=1, maximum=100_000
    )
    batch_rows: int | None = option(
        None,
        "Exact mode: every U-Net call has so many rows (a guided picture takes two), so that "
        "traffic changes no byte of a picture; None: elastic.",
        minimum=2,
        maximum=LIMITS.max_generated_batch,
    )
    # The default is what one InvokeEndpoint call may return (AWS, InvokeEndpoint: Body, 6 MB).
    max_response_bytes: int = option(
        6 * MIB,
        "Longer replies are refused, those of nested lists before any work.",
        minimum=1_000,
        maximum=10**12,
        variables=("MMS_MAX_RESPONSE_SIZE",),
    )
    max_body_bytes: int = LIMITS.max_body_bytes
    max_connections: int = option(
        4_096,
        "Open connections; one more is answered with 503 and closed.",
        minimum=1,
        maximum=1_000_000,
    )
    safety_checker: bool = True
    device: str = option(
        "auto",
        "Where to draw; auto: a GPU where there is one.",
        choices=("auto", "cpu", "cuda"),
    )
    precision: str = option(
        "auto",
        "auto: half precision on a GPU, fp32 else.",
        choices=("auto", "fp32", "fp16", "bf16"),
    )
    cuda_graphs: bool = option(
        False,
        "On a GPU, launches a U-Net call's kernels all at once; not measured on one yet.",
    )
    channels_last: bool = option(
        False,
        "Keeps the channels of convolutions last, which changes pictures by rounding; for GPUs, "
        "and not measured on one yet.",
    )
    log_level: str = option(
        "info",
        "What the log holds; info: one line per request.",
        choices=("debug", "info", "warning", "error"),
    )
    model_is_platforms: bool = False


_NO_SAFETY_CHECKER: Final = Knob(
    name="no_safety_checker",
    kind="bool",
    default=False,
    sentence="Does not run the model's safety checker.",
)
KNOBS: Final = tuple(
    replace(knob, variables=(f"DREAMBOOTH_{knob.name.upper()}", *knob.variables))
    for knob in (*knobs_of(ServeSettings), _NO_SAFETY_CHECKER)
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options; their values stay strings until `read` parses them."""
    command_line.add_arguments(parser, KNOBS)


def read(arguments: argparse.Namespace, environ: Mapping[str, str]) -> ServeSettings:
    """Parse and check options and variables; raise one HyperparameterError that names all faults.

    The default model lies where SageMaker unpacks it: ``<SAGEMAKER_BASE_DIR or /opt/ml>/model``.
    """
    values, faults = command_line.read(KNOBS, arguments, environ)
    if faults:
        raise HyperparameterError(faults)
    values["safety_checker"] = not values.pop(_NO_SAFETY_CHECKER.name, False)
    if "model" not in values:
        base = environ.get("SAGEMAKER_BASE_DIR") or "/opt/ml"
        values |= {"model": f"{base.rstrip('/')}/model", "model_is_platforms": True}
    return ServeSettings(**values)
