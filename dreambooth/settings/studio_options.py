"""Declare the options of `python -m dreambooth studio`, once, and read them."""

from __future__ import annotations

import argparse
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from dreambooth.errors import HyperparameterError, quoted
from dreambooth.settings import command_line
from dreambooth.settings.knob import knobs_of, option

PASSWORD: Final = "DREAMBOOTH_STUDIO_PASSWORD"
LEAST_PASSWORD_CHARACTERS: Final = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class StudioSettings:
    """The settings of the page. password: "" if anyone who reaches the address may use it."""

    port: int = option(7860, "Port of the page; 0 takes a free one.", minimum=0, maximum=65_535)
    dir: Path = option(Path("out/runs"), "Folder of the runs.")
    model: str | None = option(
        None,
        "Model that new runs start from, as --pretrained-model; None: the embedded one.",
        is_printable=True,
    )
    host: str = option(
        "127.0.0.1",
        f"Address to listen on; one that others reach needs a password in {PASSWORD}.",
        is_printable=True,
    )
    password: str = field(default="", repr=False)


KNOBS: Final = knobs_of(StudioSettings)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options; their values stay strings until `read` parses them."""
    command_line.add_arguments(parser, KNOBS)


def read(arguments: argparse.Namespace, environ: Mapping[str, str]) -> StudioSettings:
    """Parse and check options; raise one HyperparameterError that names all faults.

    The password is read from a variable: all users of a machine see its command lines.
    """
    values, faults = command_line.read(KNOBS, arguments, environ)
    password = environ.get(PASSWORD, "")
    host = values.get("host", "127.0.0.1")
    if 0 < len(password) < LEAST_PASSWORD_CHARACTERS:
        faults.append(
            f"{PASSWORD} has {len(password)} characters: take at least {LEAST_PASSWORD_CHARACTERS}."
        )
    elif not password and not is_loopback(host):
        faults.append(
            f"--host {quoted(host)} can be reached from other machines: set a password in "
            f"{PASSWORD}, or leave --host out and reach the page through `ssh -L`."
        )
    if faults:
        raise HyperparameterError(faults)
    return StudioSettings(password=password, **values)


def is_loopback(host: str) -> bool:
    """Return whether an address of this machine, or its name, is reached from nowhere else."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
