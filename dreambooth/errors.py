"""The project's own exceptions, the only ones whose messages are meant for the user.

::

    DreamBoothError                 the message says what is wrong, where, and what to do
    ├── UserError                   the user's input: exit code 1, the failure file
    │   ├── HyperparameterError     names every wrong option of a command
    │   ├── DatasetError            names the file or folder
    │   ├── ModelArtifactError      wrong layout, unsafe archive, a pickle that is more than weights
    │   └── RequestError            HTTP 400 · 406 Accept · 413 too large · 415 content type
    ├── ResourceError               too little memory, disk, ...: says what to change; HTTP 507
    │   └── UnavailableError        overloaded, loading, engine down: says when to retry; HTTP 503
    └── TrainingDivergedError       loss or gradient not finite: names the step

Any other exception is a bug of ours: its trace goes to the log, and the client receives only
"internal error".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

MOST_SENTENCE_CHARACTERS: Final = 2_000
_MOST_MESSAGE_CHARACTERS: Final = 20_000
_MOST_QUOTED_CHARACTERS: Final = 60
_MOST_FOREIGN_CHARACTERS: Final = 300
_NAMED_AT_MOST: Final = 3


def one_line(text: str, most: int = MOST_SENTENCE_CHARACTERS) -> str:
    """Return a text as one printable line; its middle is cut out if it is longer than `most`.

    Names come from untrusted files: a line break or a terminal's escape code in one could forge a
    line of the log. Characters that are not printable are written as Python's escapes.
    """
    if len(text) > most:
        text = f"{text[: most // 2]}...{text[len(text) - most // 2 :]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def quoted(value: object) -> str:
    """Return an untrusted value, ready to be quoted: printable, at most 60 characters."""
    text = repr(value[: _MOST_QUOTED_CHARACTERS + 1]) if isinstance(value, str) else str(value)
    is_short = len(text) <= _MOST_QUOTED_CHARACTERS
    return text if is_short else one_line(text[: _MOST_QUOTED_CHARACTERS - 3]) + "..."


def some_of(names: Sequence[str]) -> str:
    """Return the first of many untrusted names, and how many more there are."""
    more = len(names) - _NAMED_AT_MOST
    listed = ", ".join(one_line(name, 100) for name in names[:_NAMED_AT_MOST])
    return listed + (f" and {more} more" if more > 0 else "")


def in_one_line(error: BaseException) -> str:
    """Return a library's error message, short enough for a sentence and without its full stop."""
    text = " ".join((str(error) or type(error).__name__).split())
    return one_line(text[:_MOST_FOREIGN_CHARACTERS]).rstrip(".")


class DreamBoothError(Exception):
    """The base of all errors whose message is written for the user; it is stored as one line."""

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(message))


class UserError(DreamBoothError):
    """The user's input is wrong; the message says what to change."""


class HyperparameterError(UserError):
    """One or more options of a command are wrong; one message names them all."""

    def __init__(self, faults: Sequence[str] | str) -> None:
        """Take one sentence per fault; a single string counts as one fault."""
        all_faults = (faults,) if isinstance(faults, str) else faults
        self.faults: tuple[str, ...] = tuple(one_line(fault) for fault in all_faults)
        Exception.__init__(self, one_line(self._message(), _MOST_MESSAGE_CHARACTERS))

    def _message(self) -> str:
        if len(self.faults) <= 1:
            return "".join(self.faults)
        numbered = " ".join(f"({i}) {fault}" for i, fault in enumerate(self.faults, start=1))
        return f"{len(self.faults)} settings are wrong: {numbered}"

    def __reduce__(self) -> tuple[type[HyperparameterError], tuple[tuple[str, ...]]]:
        """Pickle the faults, so that the error can be sent between processes."""
        return type(self), (self.faults,)


class DatasetError(UserError):
    """The folder of pictures or a file in it cannot be used; the message names it."""


class ModelArtifactError(UserError):
    """A model folder or archive is malformed or unsafe; the message names it."""


class RequestError(UserError):
    """An inference request cannot be served as it was sent."""

    def __init__(self, message: str, status: int = 400) -> None:
        """Take the message for the client and the HTTP status (400, 404, 406, 413 or 415)."""
        super().__init__(message)
        self.status = status

    def __reduce__(self) -> tuple[type[RequestError], tuple[str, int]]:
        """Pickle message and status together."""
        return type(self), (str(self), self.status)


class ResourceError(DreamBoothError):
    """The machine lacks something, mostly memory or disk space; the message says what to change."""


class UnavailableError(ResourceError):
    """The server cannot answer now: it is overloaded, loading or closing, or its engine is down."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        """Take the message for the client and the seconds after which it may ask again."""
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[type[UnavailableError], tuple[str, float]]:
        """Pickle message and seconds together."""
        return type(self), (str(self), self.retry_after_s)


class TrainingDivergedError(DreamBoothError):
    """The loss or a gradient is no longer finite."""

    def __init__(self, message: str, step: int) -> None:
        """Take the message for the user and the step (counted from 1) at which it was seen."""
        super().__init__(message)
        self.step = step

    def __reduce__(self) -> tuple[type[TrainingDivergedError], tuple[str, int]]:
        """Pickle message and step together."""
        return type(self), (str(self), self.step)
