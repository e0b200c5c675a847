"""Keep the accepted requests until they are answered, with the pictures each waits for."""

from __future__ import annotations

import asyncio

from dreambooth.errors import UnavailableError
from dreambooth.serving.contract.reply import Picture
from dreambooth.serving.supervision import admission
from dreambooth.serving.supervision.admission import EngineSpeed, Work
from dreambooth.serving.supervision.messages import Done, Drawn, Failed


class ProtocolError(Exception):
    """The engine sent a well-formed message that is not allowed at this point."""


class PendingRequest:
    """A request in the engine; `result` becomes all its pictures, in order, or an error."""

    def __init__(self, work: tuple[Work, ...]) -> None:
        self.request_id = work[0].request_id
        self.result: asyncio.Future[list[Picture]] = asyncio.get_running_loop().create_future()
        self.work = list(work)  # of each picture, with the remaining steps
        self._pictures: list[Picture | None] = [None] * len(work)

    @property
    def picture_count(self) -> int:
        """Return how many pictures the request has, finished or not."""
        return len(self._pictures)

    def missing(self) -> list[int]:
        """Return the indices of the pictures that have not arrived."""
        return [i for i, picture in enumerate(self._pictures) if picture is None]

    def drawn(self, message: Drawn) -> None:
        """Take a finished picture; raise ProtocolError if it was not asked for."""
        if not 0 <= message.index < len(self.work) or self._pictures[message.index] is not None:
            raise ProtocolError(f"picture {message.index} of a request was not expected")
        work = self.work[message.index]
        height, width, _ = message.picture.pixels.shape
        if (width, height) != work.size:
            raise ProtocolError(
                f"a picture of {width} x {height} pixels came where "
                f"{work.width} x {work.height} were asked for"
            )
        self._pictures[message.index] = message.picture
        if not self.missing() and not self.result.done():
            self.result.set_result([one for one in self._pictures if one is not None])

    def done(self) -> None:
        """Raise ProtocolError if a picture is missing; the last one has set `result` already."""
        if self.missing():
            raise ProtocolError("a request was said to be done before its last picture came")

    def failed(self, error: Exception) -> None:
        """End the request with an error, unless `result` is there already."""
        if not self.result.done():
            self.result.set_exception(error)
            # Mark it as read: its waiter may just have been cancelled, and asyncio would complain.
            self.result.exception()


class PendingRequests:
    """All pending requests, in the order of their admission."""

    def __init__(self) -> None:
        self._pending: dict[int, PendingRequest] = {}

    def __len__(self) -> int:
        return len(self._pending)

    @property
    def picture_count(self) -> int:
        """Return how many pictures all pending requests have, finished or not."""
        return sum(pending_request.picture_count for pending_request in self._pending.values())

    def ahead(self) -> list[Work]:
        """Return the work that the engine does before that of a new request."""
        return [
            pending_request.work[i]
            for pending_request in self._pending.values()
            for i in pending_request.missing()
        ]

    def add(self, pending_request: PendingRequest) -> None:
        """Add a request."""
        self._pending[pending_request.request_id] = pending_request

    def remove(self, pending_request: PendingRequest) -> None:
        """Remove a request, answered or not."""
        self._pending.pop(pending_request.request_id, None)

    def calls_were_made(self, count: int, speed: EngineSpeed) -> None:
        """Take `count` U-Net calls, made since the last time, off the remaining work."""
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
        """Pass a message to its request; drop it if nobody waits for that any more."""
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
        """Fail every request that has no result with UnavailableError; return how many."""
        lost = [
            pending_request
            for pending_request in self._pending.values()
            if not pending_request.result.done()
        ]
        for pending_request in lost:
            pending_request.failed(UnavailableError(message, retry_after_s))
        return len(lost)
