"""The requests that were taken and are not answered: what each waits for, and their end."""

from __future__ import annotations

import asyncio

import numpy as np

from dreambooth.errors import UnavailableError
from dreambooth.serving.contract.reply import Picture
from dreambooth.serving.supervision import admission
from dreambooth.serving.supervision.admission import EngineSpeed, Work
from dreambooth.serving.supervision.messages import Done, Drawn, Failed


class ProtocolError(Exception):
    """The engine said something that its own rules forbid."""


class PendingRequest:
    """One request in the engine; `result` ends with all its pictures, in order, or an error."""

    def __init__(self, work: tuple[Work, ...]) -> None:
        self.request_id = work[0].request_id
        self.result: asyncio.Future[list[Picture]] = asyncio.get_running_loop().create_future()
        self.work = list(work)  # of each picture, with the steps that are left
        self._pictures: list[Picture | None] = [None] * len(work)

    @property
    def picture_count(self) -> int:
        """Pictures of the request, finished or not."""
        return len(self._pictures)

    def missing(self) -> list[int]:
        """The pictures that have not come."""
        return [i for i, picture in enumerate(self._pictures) if picture is None]

    def drawn(self, message: Drawn) -> None:
        """Take one picture."""
        if not 0 <= message.index < len(self.work) or self._pictures[message.index] is not None:
            raise ProtocolError(f"picture {message.index} of a request was not expected")
        work = self.work[message.index]
        if (message.width, message.height) != work.size:
            raise ProtocolError(
                f"a picture of {message.width} x {message.height} pixels came where "
                f"{work.width} x {work.height} were asked for"
            )
        pixels = np.frombuffer(message.pixels, np.uint8)
        self._pictures[message.index] = Picture(
            pixels=pixels.reshape(message.height, message.width, 3),
            seed=message.seed,
            finish_reason=message.finish_reason,
            exact=message.exact,
        )
        if not self.missing() and not self.result.done():
            self.result.set_result([one for one in self._pictures if one is not None])

    def done(self) -> None:
        """All pictures have been sent; with the last of them the result was there already."""
        if self.missing():
            raise ProtocolError("a request was said to be done before its last picture came")

    def failed(self, error: Exception) -> None:
        """There will be no pictures."""
        if not self.result.done():
            self.result.set_exception(error)
            # Its waiter may have been cancelled in this very moment: then nobody asks for it.
            self.result.exception()


class PendingRequests:
    """All of them, in the order of their admission."""

    def __init__(self) -> None:
        self._pending: dict[int, PendingRequest] = {}

    def __len__(self) -> int:
        return len(self._pending)

    @property
    def picture_count(self) -> int:
        """Pictures of all requests that were not answered yet."""
        return sum(pending_request.picture_count for pending_request in self._pending.values())

    def ahead(self) -> list[Work]:
        """Return the work that the engine does before a new request's."""
        return [
            pending_request.work[i]
            for pending_request in self._pending.values()
            for i in pending_request.missing()
        ]

    def add(self, pending_request: PendingRequest) -> None:
        """Count a request in."""
        self._pending[pending_request.request_id] = pending_request

    def remove(self, pending_request: PendingRequest) -> None:
        """Count it out, answered or not."""
        self._pending.pop(pending_request.request_id, None)

    def calls_were_made(self, count: int, speed: EngineSpeed) -> None:
        """Note that the engine made so many U-Net calls since this was last noted."""
        places = [
            (pending_request, i)
            for pending_request in self._pending.values()
            for i in pending_request.missing()
        ]
        now = admission.after(
            [pending_request.work[i] for pending_request, i in places], speed, count
        )
        for (pending_request, i), work in zip(places, now, strict=True):
            pending_request.work[i] = work

    def take(self, message: Drawn | Done | Failed) -> None:
        """Hand the engine's message to its request; what nobody waits for any more is dropped."""
        pending_request = self._pending.get(message.request_id)
        if pending_request is None:
            return
        if isinstance(message, Drawn):
            pending_request.drawn(message)
        elif isinstance(message, Done):
            pending_request.done()
        else:
            pending_request.failed(message.fault.exception())

    def fail_all(self, message: str, retry_after_s: float) -> int:
        """End every request with an UnavailableError; return how many there were."""
        lost = [
            pending_request
            for pending_request in self._pending.values()
            if not pending_request.result.done()
        ]
        for pending_request in lost:
            pending_request.failed(UnavailableError(message, retry_after_s))
        return len(lost)
