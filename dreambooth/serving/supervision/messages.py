"""Define the messages between the server process and the engine process, without torch.

The server sends Generate, Cancel and Close. The engine sends Ready or LoadFailed once, then a Drawn
per picture as each is finished, and a Done or a Failed at the end of each request that was not
cancelled. From its start on it sends an EngineStatus about twice a second, and whenever a request
ends. `wire` turns messages into bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from dreambooth.serving.contract.reply import FinishReason


class EngineFaultError(RuntimeError):
    """An error in the engine that is our fault; the log has its trace, the client no details."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureOrder:
    """A SamplingRequest whose two texts are indices into the `texts` of its Generate message."""

    prompt: int
    negative_prompt: int
    num_inference_steps: int
    guidance_scale: float
    width: int | None
    height: int | None
    seed: int
    eta: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Generate:
    """The command to draw the pictures of one request.

    texts: all prompts and negative prompts, equal ones once. batch_size: the most pictures of this
    request in one U-Net call, None without a limit.
    """

    request_id: int
    texts: tuple[str, ...]
    orders: tuple[PictureOrder, ...]
    batch_size: int | None

    @classmethod
    def of(
        cls, request_id: int, pictures: Sequence[SamplingRequest], batch_size: int | None
    ) -> Generate:
        """Return the message that asks for these pictures."""
        table: dict[str, int] = {}
        orders = tuple(
            PictureOrder(
                prompt=table.setdefault(picture.prompt, len(table)),
                negative_prompt=table.setdefault(picture.negative_prompt, len(table)),
                num_inference_steps=picture.num_inference_steps,
                guidance_scale=picture.guidance_scale,
                width=picture.width,
                height=picture.height,
                seed=picture.seed,
                eta=picture.eta,
            )
            for picture in pictures
        )
        return cls(request_id=request_id, texts=tuple(table), orders=orders, batch_size=batch_size)

    def sampling_requests(self) -> tuple[SamplingRequest, ...]:
        """Return the pictures; raise IndexError if an order points beyond `texts`."""
        return tuple(
            SamplingRequest(
                prompt=self.texts[order.prompt],
                negative_prompt=self.texts[order.negative_prompt],
                num_inference_steps=order.num_inference_steps,
                guidance_scale=order.guidance_scale,
                width=order.width,
                height=order.height,
                seed=order.seed,
                eta=order.eta,
            )
            for order in self.orders
        )


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
    """One finished picture; `pixels` are its RGB bytes, row by row, sent outside the JSON."""

    request_id: int
    index: int
    width: int
    height: int
    seed: int
    finish_reason: FinishReason
    exact: bool
    pixels: bytes | bytearray


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
