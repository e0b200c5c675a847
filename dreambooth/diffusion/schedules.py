"""The schedules of a model, read once each and remembered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dreambooth.diffusion.schedule_reading import ROWS_AT_ONCE, Reader
from dreambooth.diffusion.step_tables import Schedule

_NO_MATTER = -1.0  # eta of noise schedulers that do not know it


class Schedules:
    """The schedules of one model by number of steps (and eta, where it matters); some stay."""

    def __init__(self, make: Callable[[], Any], *, most: int = 64) -> None:
        """`make` returns a fresh noise scheduler; at most `most` schedules are remembered.

        One takes some 0.3 ms per step to read, and half a kilobyte per step.
        """
        self._make = make
        self._most = most
        self._known: dict[tuple[int, float], Schedule] = {}
        self._unread: tuple[tuple[int, float], Reader] | None = None  # one, and what it is

    def take(self, num_inference_steps: int, *, eta: float = 0.0) -> Schedule:
        """Return the schedule of so many steps, read to its end."""
        while True:
            schedule = self.take_known(num_inference_steps, eta=eta)
            if schedule is not None:
                return schedule
            self.read_on(num_inference_steps, eta=eta)

    def take_known(self, num_inference_steps: int, *, eta: float = 0.0) -> Schedule | None:
        """Return the schedule of so many steps if it has been read."""
        return self._known.get((num_inference_steps, eta)) or self._known.get(
            (num_inference_steps, _NO_MATTER)
        )

    def read_on(
        self, num_inference_steps: int, *, eta: float = 0.0, most_steps: int = ROWS_AT_ONCE
    ) -> None:
        """Read at most `most_steps` steps of it, or of another that is not read to its end."""
        wanted = num_inference_steps, eta
        if self._unread is None:
            self._unread = wanted, Reader(self._make(), num_inference_steps, eta=eta)
        read, reader = self._unread
        try:
            schedule = reader.read_on(most_steps)
        except Exception:
            self._unread = None
            if read == wanted:
                raise
            return  # who wants that one will hear of it
        if schedule is None:
            return
        self._unread = None
        if len(self._known) >= self._most:
            del self._known[next(iter(self._known))]
        self._known[read[0], schedule.options.get("eta", _NO_MATTER)] = schedule
