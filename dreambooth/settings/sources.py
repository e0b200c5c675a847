"""Read a job's settings from the command line, ``SM_*`` variables and hyperparameters.json.

Each source is read into raw names and values; `OptionValues` finds the value of an option that is
no hyperparameter. Precedence: argument > ``SM_*`` variable > file under the root. Formats: AWS,
"How Amazon SageMaker AI provides training information". Standard library only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from dreambooth.errors import UserError
from dreambooth.limits import Limits
from dreambooth.process import addresses
from dreambooth.settings import hyperparameters
from dreambooth.settings.knob import BARE_FLAG, Knob, is_unset, unwrapped
from dreambooth.settings.ways_in import Way

LOG_LEVELS: Final = ("debug", "info", "warning", "error", "critical")
LOG_LEVEL: Final = "log_level"
DRY_RUN: Final = "dry_run"
OUTPUTS: Final = ("model_dir", "output_data_dir", "checkpoint_dir")


class OptionValues:
    """The value of each option, taken from the first source that gives one.

    ``""``, ``None`` and ``null`` are no values, so that the next source counts. In a container the
    address of an output folder (``s3://...``, which old clients send) is no value either, because
    the platform copies its own folder there. `set_aside` holds such addresses by option.
    """

    def __init__(
        self,
        knobs: Iterable[Knob],
        arguments: Mapping[str, object],
        variables: Mapping[str, object],
        environ: Mapping[str, str],
        file: Mapping[str, object],
        faults: list[str],
        *,
        in_container: bool,
    ) -> None:
        self._knobs = {knob.name: knob for knob in knobs}
        # The platform sets these variables on its own; what the user set outranks them.
        self._platform = {
            knob.name: environ.get(variable, "")
            for knob in self._knobs.values()
            for variable in knob.variables
        }
        if not level_of(self._platform.get(LOG_LEVEL, "").strip()):
            self._platform.pop(LOG_LEVEL, None)
        self._sources = (arguments, variables, self._platform, file)
        self._faults = faults
        self._in_container = in_container
        self.set_aside: dict[str, str] = {}

    def value(self, name: str) -> Any:
        """Return the parsed value of an option, None if no source gives one or it is wrong."""
        raw = self._source(name).get(name)
        if is_unset(raw):
            return None
        if name == LOG_LEVEL:
            raw = level_of(unwrapped(raw) or "") or raw
        try:
            return self._knobs[name].parse(raw, source=self._named(name))
        except UserError as fault:
            self._faults.append(str(fault))
            return None

    def raw(self, name: str) -> object:
        """Return the value of an option as it is given, None if no source gives one."""
        return self._source(name).get(name)

    def is_platforms(self, name: str) -> bool:
        """Return whether the value of an option is the platform's own variable."""
        return self.way(name) == "platform"

    def way(self, name: str) -> Way | None:
        """Return in which way an option is given, None if it is not."""
        source = self._source(name)
        ways: tuple[Way, ...] = ("option", "setting", "platform", "setting")
        found = (way for way, other in zip(ways, self._sources, strict=True) if other is source)
        return next(found, None)

    def _named(self, name: str) -> str:
        """Return the name under which the user gives the value of an option."""
        way = self.way(name)
        if way == "platform":
            return self._knobs[name].variables[0]
        return f"--{name}" if way == "option" else name

    def _source(self, name: str) -> Mapping[str, object]:
        """Return the first source that gives the option a value, an empty one if none does."""
        for source in self._sources:
            raw = source.get(name)
            if not is_unset(raw) and not self._is_set_aside(name, unwrapped(raw)):
                return source
        return {}

    def _is_set_aside(self, name: str, text: str | None) -> bool:
        if not (self._in_container and name in OUTPUTS and text and addresses.is_remote(text)):
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
