"""Define the messages between the server process and the engine process, without torch.

The server sends Generate, Cancel and Close. The engine sends Ready or LoadFailed once, then a Drawn
per picture as each is finished, and a Done or a Failed at the end of each request that was not
cancelled. From its start on it sends an EngineStatus about twice a second, and whenever a request
ends. `wire` turns messages into bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from dreambooth.diffusion.sampling_request import SamplingRequest
from dreambooth.errors import (
    DreamBoothError,
    ModelArtifactError,
    RequestError,
    ResourceError,
    UnavailableError,
    UserError,
)
from dreambooth.serving.contract.engine_status import EngineStatus
from dreambooth.serving.contract.reply import Picture


class EngineFaultError(RuntimeError):
    """An error in the engine that is our fault; the log has its trace, the client no details."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generate:
    """The command to draw the pictures of one request.

    batch_size: the most of them in one U-Net call, None without a limit.
    """

    request_id: int
    pictures: tuple[SamplingRequest, ...]
    batch_size: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """The command to stop a request at the next step, since nobody waits for it any more."""

    request_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Close:
    """The command to drop all remaining work and exit with 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The message that the model is loaded and has drawn a warm-up picture.

    seconds_per_call: (rows, seconds) of U-Net calls, measured at the model's own resolution.
    seconds_per_decode: of one picture. rows: the most rows that one call will have.
    """

    seconds_per_call: tuple[tuple[int, float], ...]
    seconds_per_decode: float
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """One finished picture of a request."""

    request_id: int
    index: int
    picture: Picture


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """The message that all pictures of a request have been sent."""

    request_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """An error as it is sent between processes: class name, message and numbers."""

    error: str
    message: str
    status: int | None = None
    retry_after_s: float | None = None

    @classmethod
    def of(cls, error: BaseException) -> Fault:
        """Describe an error; of one that is no DreamBoothError keep only the class name."""
        if not isinstance(error, DreamBoothError):
            return cls(error=EngineFaultError.__name__, message=type(error).__name__)
        return cls(
            error=type(error).__name__,
            message=str(error),
            status=error.status if isinstance(error, RequestError) else None,
            retry_after_s=error.retry_after_s if isinstance(error, UnavailableError) else None,
        )

    def exception(self) -> Exception:
        """Return the error as an exception, EngineFaultError for a class unknown here."""
        if self.error == RequestError.__name__:
            return RequestError(self.message, 400 if self.status is None else self.status)
        if self.error == UnavailableError.__name__:
            return UnavailableError(self.message, self.retry_after_s or 1.0)
        known = {kind.__name__: kind for kind in (UserError, ModelArtifactError, ResourceError)}
        return known.get(self.error, EngineFaultError)(self.message)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadFailed:
    """The message that the engine could not be opened; its process ends after this."""

    fault: Fault


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The message that a request ended in an error."""

    request_id: int
    fault: Fault


ToEngine = Generate | Cancel | Close
FromEngine = Ready | LoadFailed | Drawn | Done | Failed | EngineStatus
