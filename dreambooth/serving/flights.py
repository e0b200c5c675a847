"""The requests that were taken and are not answered: what each waits for, and their end."""

from __future__ import annotations

import asyncio

import numpy as np

from dreambooth.errors import UnavailableError
from dreambooth.serving import admission
from dreambooth.serving.admission import Pace, Work
from dreambooth.serving.messages import Done, Drawn, Failed
from dreambooth.serving.reply import Picture


class ProtocolError(Exception):
    """The engine said something that its own rules forbid."""


class Flight:
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


class Flights:
    """All of them, in the order of their admission."""

    def __init__(self) -> None:
        self._flights: dict[int, Flight] = {}

    def __len__(self) -> int:
        return len(self._flights)

    @property
    def picture_count(self) -> int:
        """Pictures of all requests that were not answered yet."""
        return sum(flight.picture_count for flight in self._flights.values())

    def ahead(self) -> list[Work]:
        """What the engine has to do before a new request's turn comes."""
        return [flight.work[i] for flight in self._flights.values() for i in flight.missing()]

    def add(self, flight: Flight) -> None:
        """Count a request in."""
        self._flights[flight.request_id] = flight

    def remove(self, flight: Flight) -> None:
        """Count it out, answered or not."""
        self._flights.pop(flight.request_id, None)

    def calls_were_made(self, count: int, pace: Pace) -> None:
        """Note that the engine made so many U-Net calls since this was last noted."""
        places = [(flight, i) for flight in self._flights.values() for i in flight.missing()]
        now = admission.after([flight.work[i] for flight, i in places], pace, count)
        for (flight, i), work in zip(places, now, strict=True):
            flight.work[i] = work

    def take(self, message: Drawn | Done | Failed) -> None:
        """Hand the engine's message to its request; what nobody waits for any more is dropped."""
        flight = self._flights.get(message.request_id)
        if flight is None:
            return
        if isinstance(message, Drawn):
            flight.drawn(message)
        elif isinstance(message, Done):
            flight.done()
        else:
            flight.failed(message.fault.exception())

    def fail_all(self, message: str, retry_after_s: float) -> int:
        """End every request with an UnavailableError; return how many there were."""
        lost = [flight for flight in self._flights.values() if not flight.result.done()]
        for flight in lost:
            flight.failed(UnavailableError(message, retry_after_s))
        return len(lost)
