"""A cache of a model's schedules, so that each is read only once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dreambooth.diffusion.schedule_reading import ROWS_AT_ONCE, Reader
from dreambooth.diffusion.step_tables import Schedule

_ANY_ETA = -1.0  # key instead of eta for noise schedulers that have no eta


class Schedules:
    """A cache of one model's schedules by number of steps and, where it matters, eta."""

    def __init__(self, make: Callable[[], Any], *, most: int = 64) -> None:
        """Take a function that returns a new noise scheduler; keep at most `most` schedules.

        Reading a schedule takes some 0.3 ms per step; keeping it takes half a kilobyte per step.
        """
        self._make = make
        self._most = most
        self._known: dict[tuple[int, float], Schedule] = {}
        self._unread: tuple[tuple[int, float], Reader] | None = None  # the one being read

    def take(self, num_inference_steps: int, *, eta: float = 0.0) -> Schedule:
        """Return the schedule of num_inference_steps; read it to its end if necessary."""
        while True:
            schedule = self.take_known(num_inference_steps, eta=eta)
            if schedule is not None:
                return schedule
            self.read_on(num_inference_steps, eta=eta)

    def take_known(self, num_inference_steps: int, *, eta: float = 0.0) -> Schedule | None:
        """Return the schedule of num_inference_steps if it has been read, else None."""
        return self._known.get((num_inference_steps, eta)) or self._known.get(
            (num_inference_steps, _ANY_ETA)
        )

    def read_on(
        self, num_inference_steps: int, *, eta: float = 0.0, most_steps: int = ROWS_AT_ONCE
    ) -> None:
        """Read at most `most_steps` steps of this schedule, or of another that is being read."""
        wanted = num_inference_steps, eta
        if self._unread is None:
            self._unread = wanted, Reader(self._make(), num_inference_steps, eta=eta)
        read, reader = self._unread
        try:
            schedule = reader.read_on(most_steps)
        except Exception:  # of diffusers' code; whoever wants this schedule gets it
            self._unread = None
            if read == wanted:
                raise
            return  # the error comes again when that schedule is wanted
        if schedule is None:
            return
        self._unread = None
        if len(self._known) >= self._most:
            del self._known[next(iter(self._known))]
        self._known[read[0], schedule.options.get("eta", _ANY_ETA)] = schedule
