"""The queue of pictures: which latent size the next U-Net call draws, and which rows join it.

Sizes stand in a ring and every call goes to the next one with work: between two calls for one
size every other size is called at most once, however many there are and whoever comes later.
Within a size pictures join in the order in which they came. One that needs more rows than are free
is waited for, not overtaken; only pictures of a job that has its share already are passed over.
So a picture joins, at the latest, once those before it have been drawn. No torch here: a
simulation uses the same lines.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from typing import Any, Generic, Protocol, TypeVar

# After a step a finished picture is decoded, layer by layer, until so much of the time that the
# step took has passed.
DECODING_SHARE = 0.5


class Queued(Protocol):
    """A picture, as the queue sees it.

    size: of the latents; only equal ones share a call. unet_rows: 1, or 2 if guided. places: the
    very rows of a call that it must have, where the place matters. job: most_pictures is the most
    of them in one call.
    """

    @property
    def size(self) -> Hashable: ...  # noqa: D102
    @property
    def unet_rows(self) -> int: ...  # noqa: D102
    @property
    def places(self) -> tuple[int, ...] | None: ...  # noqa: D102
    @property
    def job(self) -> Any: ...  # noqa: D102


Row = TypeVar("Row", bound=Queued)


class BatchQueue(Generic[Row]):
    """The pictures that wait and those that run, by size."""

    def __init__(self, most_rows: Callable[[Any], int]) -> None:
        """most_rows(size): the rows that one call may have, asked before every call."""
        self._most_rows = most_rows
        self._ring: deque[Hashable] = deque()
        self._waiting: dict[Hashable, deque[Row]] = {}
        self._running: dict[Hashable, list[Row]] = {}
        self.waiting_count = 0

    @property
    def running_rows(self) -> int:
        """U-Net rows of all pictures that have joined and not left."""
        return sum(row.unet_rows for rows in tuple(self._running.values()) for row in tuple(rows))

    @property
    def busy(self) -> bool:
        """Whether any picture runs."""
        return any(self._running.values())

    def add(self, row: Row) -> None:
        """Put a picture at the end of its size's queue."""
        if row.size not in self._waiting:
            self._ring.append(row.size)
            self._waiting[row.size], self._running[row.size] = deque(), []
        self._waiting[row.size].append(row)
        self.waiting_count += 1

    def next(self, *, admit: bool = True) -> tuple[list[Row], list[Row]]:
        """Return the rows of the next call (those that just joined, too), and who just joined.

        Without `admit` nobody joins. Both lists are empty where nothing can run.
        """
        for _ in range(len(self._ring)):
            size = self._ring[0]
            self._ring.rotate(-1)
            joined = self._admit(size) if admit else []
            running = self._running[size]
            if running:
                return list(running), joined
            if not self._waiting[size]:
                self._ring.remove(size)
                del self._waiting[size], self._running[size]
        return [], []

    def leave(self, row: Row) -> None:
        """A picture has taken its last step, or is lost."""
        self._running[row.size].remove(row)

    def drop(self, unwanted: Callable[[Row], bool]) -> None:
        """Remove every picture, waiting or running, that is not wanted any more."""
        for size, waiting in self._waiting.items():
            self._waiting[size] = deque(row for row in waiting if not unwanted(row))
            self._running[size] = [row for row in self._running[size] if not unwanted(row)]
        self.waiting_count = sum(map(len, self._waiting.values()))

    def _admit(self, size: Hashable) -> list[Row]:
        running, waiting = self._running[size], self._waiting[size]
        free = self._most_rows(size) - sum(row.unet_rows for row in running)
        taken = {place for row in running for place in row.places or ()}
        joined: list[Row] = []
        passed: list[Row] = []
        while waiting and (free > 0 or not running):
            row = waiting.popleft()
            if self._has_its_share(row):
                passed.append(row)
                continue
            fits = taken.isdisjoint(row.places or ())
            taken.update(row.places or ())  # whoever waits for a place keeps later ones from it
            if row.places is None and row.unet_rows > free and running:
                passed.append(row)
                break
            (joined if fits else passed).append(row)
            if fits:
                running.append(row)
                free -= row.unet_rows
        waiting.extendleft(reversed(passed))
        self.waiting_count -= len(joined)
        return joined

    def _has_its_share(self, row: Row) -> bool:
        most = row.job.most_pictures
        if most is None:
            return False
        taken = sum(other.job is row.job for other in self._running[row.size])
        return bool(taken >= most)
