"""Read a job's settings from the command line, ``SM_*`` variables and hyperparameters.json.

Each source is read into raw names and values; `OptionValues` finds the value of an option that is
no hyperparameter. Precedence: argument > ``SM_*`` variable > file under the root. Formats: AWS,
"How Amazon SageMaker AI provides training information". Standard library only.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from dreambooth.errors import UserError, quoted
from dreambooth.limits import Limits
from dreambooth.process import addresses
from dreambooth.settings import hyperparameters
from dreambooth.settings.knob import BARE_FLAG, unwrapped

LOG_LEVELS: Final = ("debug", "info", "warning", "error", "critical")
LOG_LEVEL: Final = "log_level"
DRY_RUN: Final = "dry_run"
MODEL_CHANNEL: Final = "model channel"  # no option: only the platform names it
_OUTPUTS: Final = ("model_dir", "output_data_dir", "checkpoint_dir")

# Variables that the platform sets on its own. SM_HPS and SM_HP_<NAME>, which hold what the user
# set, outrank them.
_PLATFORM_VARIABLES: Final = {
    "train": "SM_CHANNEL_TRAINING",
    MODEL_CHANNEL: "SM_CHANNEL_MODEL",
    "model_dir": "SM_MODEL_DIR",
    "output_data_dir": "SM_OUTPUT_DATA_DIR",
    LOG_LEVEL: "SM_LOG_LEVEL",
}


class OptionValues:
    """The value of each option, taken from the first source that gives one.

    ``""``, ``None`` and ``null`` are no values, so that the next source counts. In a container the
    address of an output folder (``s3://...``, which old clients send) is no value either, because
    the platform copies its own folder there. `set_aside` holds such addresses by option.
    """

    def __init__(
        self,
        arguments: Mapping[str, object],
        variables: Mapping[str, object],
        environ: Mapping[str, str],
        file: Mapping[str, object],
        faults: list[str],
        *,
        in_container: bool,
    ) -> None:
        self._user_sources = (arguments, variables)
        self._environ = environ
        self._file = file
        self._faults = faults
        self._in_container = in_container
        self.set_aside: dict[str, str] = {}

    def named(self, name: str) -> str | None:
        """Return what the user gave in an argument or in a hyperparameter's variable."""
        return self._first(name, self._user_sources)

    def platform(self, name: str) -> str | None:
        """Return the platform's own variable; an invalid log level counts as unset."""
        value = self._environ.get(_PLATFORM_VARIABLES.get(name, ""), "").strip() or None
        if value is None or (name == LOG_LEVEL and not level_of(value)):
            return None
        return None if self._is_set_aside(name, value) else value

    def text(self, name: str) -> str | None:
        """Return the value of the first source that gives one."""
        return self.named(name) or self.platform(name) or self._first(name, (self._file,))

    def path(self, name: str) -> Path | None:
        """Return the same value as a path; ``~`` and ``file://`` are resolved."""
        text = self.text(name)
        if not text:
            return None
        try:
            path = addresses.to_path(text, name)
        except UserError as error:
            self._faults.append(str(error))
            return None
        if not _can_be_path(str(path)):
            self._faults.append(f"{name} must be the path of a folder, not {quoted(text)}.")
            return None
        return path

    def _first(self, name: str, sources: Sequence[Mapping[str, object]]) -> str | None:
        for source in sources:
            value = source.get(name)
            if value is BARE_FLAG:
                if name == DRY_RUN:
                    return "True"
                self._faults.append(f"--{name} needs a value.")
                return None
            text = unwrapped(value)
            if text is None:
                self._faults.append(f"{name} must be one text, not {quoted(value)}.")
            elif text not in ("", "None", "null") and not self._is_set_aside(name, text):
                return text
        return None

    def _is_set_aside(self, name: str, text: str) -> bool:
        if not (self._in_container and name in _OUTPUTS and addresses.is_remote(text)):
            return False
        self.set_aside.setdefault(name, text)
        return True


def from_arguments(argv: Sequence[str], faults: list[str]) -> dict[str, object]:
    """Read a command line without refusing names: ``--x v``, ``--x=v`` and the bare ``--x``.

    argparse is not used here, because it takes ``-1e-6`` for an option and cannot tell which value
    belongs to an unknown option.
    """
    given: dict[str, object] = {}
    words = list(reversed(argv))
    while words:
        word = words.pop()
        if not re.match("--[A-Za-z_]", word):
            faults.append(f"The argument {word[:60]!r} belongs to no option.")
            continue
        spelled, equals, value = word.partition("=")
        name = hyperparameters.normalised(spelled)
        given[name] = value
        if not equals:
            given[name] = BARE_FLAG
            if words and not words[-1].startswith("--") and _takes(name, words[-1]):
                given[name] = words.pop()
    return given


def _takes(name: str, word: str) -> bool:
    """Return whether a word is an option's value; after ``--dry-run`` only True or False is."""
    return name != DRY_RUN or word.lower() in ("true", "false", "")


def from_variables(
    environ: Mapping[str, str], faults: list[str], limits: Limits
) -> dict[str, object]:
    """Read ``SM_HPS`` (one JSON object), then ``SM_HP_<NAME>`` (one value each), which wins."""
    whole = environ.get("SM_HPS", "")
    settings = _from_json(whole, "The variable SM_HPS", faults, limits) if whole.strip() else {}
    for variable, value in environ.items():
        if variable.startswith("SM_HP_"):
            settings[hyperparameters.normalised(variable[len("SM_HP_") :]).lower()] = value
    return settings


def from_file(path: Path, faults: list[str], limits: Limits) -> dict[str, object]:
    """Read SageMaker's hyperparameters.json, if there is one."""
    if not path.exists():
        return {}
    what = f"The file {path}"
    if not path.is_file():
        faults.append(f"{what} is not a regular file.")
        return {}
    try:
        with path.open("rb") as file:
            data = file.read(limits.max_hyperparameters_bytes + 1)
        text = data.decode("utf-8-sig")
    except OSError as error:
        faults.append(f"{what} cannot be read: {error.strerror}.")
        return {}
    except UnicodeDecodeError:
        faults.append(f"{what} is not UTF-8 text.")
        return {}
    return _from_json(text, what, faults, limits)


def _from_json(text: str, what: str, faults: list[str], limits: Limits) -> dict[str, object]:
    """Read one JSON object; numbers stay text, so that no digit is lost before parsing."""
    if len(text) > limits.max_hyperparameters_bytes:
        faults.append(f"{what} is longer than {limits.max_hyperparameters_bytes} bytes.")
        return {}
    try:
        found = json.loads(text, parse_int=str, parse_float=str, parse_constant=str)
    except (ValueError, RecursionError) as error:
        where = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        faults.append(f"{what} is not valid JSON{where}.")
        return {}
    if not isinstance(found, dict):
        faults.append(f"{what} must hold one JSON object of names and values.")
        return {}
    return {hyperparameters.normalised(name): value for name, value in found.items()}


def level_of(text: str) -> str | None:
    """Return a name of LOG_LEVELS, also for SageMaker's numbers (``SM_LOG_LEVEL=20``), or None."""
    if re.fullmatch("[1-5]0", text):
        return LOG_LEVELS[int(text) // 10 - 1]
    return text.lower() if text.lower() in LOG_LEVELS else None


def _can_be_path(text: str) -> bool:
    try:
        return "\0" not in text and bool(os.fsencode(text))
    except UnicodeEncodeError:
        return False
