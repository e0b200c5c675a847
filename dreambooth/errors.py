"""The tree of errors: the only exceptions that are meant for the user's eyes.

::

    DreamBoothError                 the message says what is wrong, where, and what to do
    ├── UserError                   their input: exit code 1 and the failure file; HTTP 4xx
    │   ├── HyperparameterError     every wrong setting of the job at once
    │   ├── DatasetError            names the file or folder
    │   ├── ModelArtifactError      wrong layout, unsafe archive, a pickle that is more than weights
    │   └── RequestError            400 · 406 Accept · 413 too large · 415 content type
    ├── ResourceError               no memory, no disk: names the knob that lowers it; HTTP 507
    │   └── UnavailableError        overloaded, loading, engine down: says when to retry; HTTP 503
    └── TrainingDivergedError       loss or gradient not finite: names the step

Anything else that is raised is a fault of ours: its trace goes to the log, the client only
hears "internal error".
"""

from __future__ import annotations

from collections.abc import Sequence


class DreamBoothError(Exception):
    """Base of all errors whose message is written for the user."""


class UserError(DreamBoothError):
    """The user's input is at fault; the message says what to change."""


class HyperparameterError(UserError):
    """One or more settings of the job are wrong; all of them are told in one message."""

    def __init__(self, faults: Sequence[str] | str) -> None:
        """Take one sentence per fault (a single string counts as one fault)."""
        self.faults: tuple[str, ...] = (faults,) if isinstance(faults, str) else tuple(faults)
        super().__init__(self._message())

    def _message(self) -> str:
        if len(self.faults) <= 1:
            return "".join(self.faults)
        numbered = " ".join(f"({i}) {fault}" for i, fault in enumerate(self.faults, start=1))
        return f"{len(self.faults)} settings are wrong: {numbered}"

    def __reduce__(self) -> tuple[type[HyperparameterError], tuple[tuple[str, ...]]]:
        """Pickle by the faults, so that the error survives a trip between processes."""
        return type(self), (self.faults,)


class DatasetError(UserError):
    """The folder of pictures or a file in it cannot be used; the message names it."""


class ModelArtifactError(UserError):
    """A model folder or archive is malformed or unsafe; the message names it."""


class RequestError(UserError):
    """An inference request cannot be served as it was sent."""

    def __init__(self, message: str, status: int = 400) -> None:
        """Take the sentence for the client and the HTTP status (400, 406, 413 or 415)."""
        super().__init__(message)
        self.status = status

    def __reduce__(self) -> tuple[type[RequestError], tuple[str, int]]:
        """Pickle message and status together."""
        return type(self), (str(self), self.status)


class ResourceError(DreamBoothError):
    """The machine has too little memory or disk; the message names the knob to lower."""


class UnavailableError(ResourceError):
    """Not now: the server is overloaded, still loading, closing, or its engine is down."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        """Take the sentence for the client and the seconds after which to ask again."""
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[type[UnavailableError], tuple[str, float]]:
        """Pickle message and seconds together."""
        return type(self), (str(self), self.retry_after_s)


class TrainingDivergedError(DreamBoothError):
    """The loss or a gradient stopped being finite."""

    def __init__(self, message: str, step: int) -> None:
        """Take the sentence for the user and the step (counted from 1) at which it was seen."""
        super().__init__(message)
        self.step = step

    def __reduce__(self) -> tuple[type[TrainingDivergedError], tuple[str, int]]:
        """Pickle message and step together."""
        return type(self), (str(self), self.step)
