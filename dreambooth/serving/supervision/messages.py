"""What the server process and the engine process say to each other: frozen messages, no torch.

To the engine: Generate, Cancel, Close. From it: Ready or LoadFailed once, then Drawn (one per
picture, as each is finished), Done or Failed (one of them ends each request) and Status (about
twice a second, and whenever something ends). How they become bytes stands in `wire`.
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
from dreambooth.serving.contract.reply import FinishReason


class EngineFaultError(RuntimeError):
    """The engine met an error of ours; its trace stands in the log, the client hears nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureOrder:
    """A SamplingRequest whose two texts are places in the table of its Generate message."""

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
    """Draw the pictures of one request; equal texts travel once, however many pictures use them.

    batch_size: at most so many pictures of this request in one U-Net call.
    """

    request_id: int
    texts: tuple[str, ...]
    orders: tuple[PictureOrder, ...]
    batch_size: int | None

    @classmethod
    def of(
        cls, request_id: int, pictures: Sequence[SamplingRequest], batch_size: int | None
    ) -> Generate:
        """Write the message for these pictures."""
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

    def pictures(self) -> tuple[SamplingRequest, ...]:
        """Read the pictures back; IndexError where an order points outside the table."""
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
    """Nobody waits for this request any more: stop it at the next step."""

    request_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Close:
    """End: drop what is left and exit with 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The model is loaded and a warm-up picture came out.

    seconds_per_call: (rows, seconds) of U-Net calls at the model's own resolution, as measured.
    seconds_per_decode: of one picture. rows: the most rows that one call will have.
    """

    seconds_per_call: tuple[tuple[int, float], ...]
    seconds_per_decode: float
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """One finished picture; `pixels` are its RGB bytes, row by row, and travel outside the JSON."""

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
    """All pictures of the request have been sent."""

    request_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """An error on its way between processes: the class by name, the sentence, its numbers."""

    error: str
    message: str
    status: int | None = None
    retry_after_s: float | None = None

    @classmethod
    def of(cls, error: BaseException) -> Fault:
        """Describe an error; of strangers only the name of the class is told."""
        if not isinstance(error, DreamBoothError):
            return cls(error=EngineFaultError.__name__, message=type(error).__name__)
        return cls(
            error=type(error).__name__,
            message=str(error),
            status=error.status if isinstance(error, RequestError) else None,
            retry_after_s=error.retry_after_s if isinstance(error, UnavailableError) else None,
        )

    def exception(self) -> Exception:
        """Return the error that `of` was given, or EngineFaultError for a class unknown here."""
        if self.error == RequestError.__name__:
            return RequestError(self.message, 400 if self.status is None else self.status)
        if self.error == UnavailableError.__name__:
            return UnavailableError(self.message, self.retry_after_s or 1.0)
        known = {kind.__name__: kind for kind in (UserError, ModelArtifactError, ResourceError)}
        return known.get(self.error, EngineFaultError)(self.message)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadFailed:
    """The engine could not be opened; the process ends after this."""

    fault: Fault


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The request ended in an error."""

    request_id: int
    fault: Fault


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """A sign of life and the gauges of the engine; all zero while it loads.

    queued_pictures: not begun. undecoded: all steps done. The *_total count from the first request
    of this process on, steps in U-Net calls. seconds_per_call: (rows, seconds) of recent calls at
    the model's own resolution, seconds_per_decode of a picture there. dropped_lines_total: of this
    process's log, that nobody read.
    """

    queued_pictures: int = 0
    running_rows: int = 0
    undecoded: int = 0
    steps_done_total: int = 0
    pictures_total: int = 0
    out_of_memory_total: int = 0
    dropped_lines_total: int = 0
    seconds_per_call: tuple[tuple[int, float], ...] = ()
    seconds_per_decode: float = 0.0
    rss_bytes: int = 0


ToEngine = Generate | Cancel | Close
FromEngine = Ready | LoadFailed | Drawn | Done | Failed | Status
