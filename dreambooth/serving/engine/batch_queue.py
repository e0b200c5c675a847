"""Choose the picture size of the next U-Net call, and the waiting pictures that join it.

The sizes are served round-robin: between two calls for one size every other size gets at most one,
however many sizes there are and whatever arrives later. Within a size, pictures join in the order
of their arrival. One that needs more rows than are free is not overtaken. Only two kinds are passed
over: pictures of a job that already has its share of the call, and pictures whose `places` are
taken, which are reserved for them. So a picture joins at the latest when those before it have been
drawn. This module needs no torch, so that a simulation can use it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from typing import Any, Generic, Protocol, TypeVar

# After a step a finished picture is decoded, layer by layer, until this share of the step's time
# has passed. It stands here so that a simulation can use it without torch.
DECODING_SHARE = 0.5


class Queued(Protocol):
    """The part of a picture that the queue uses.

    size: (width, height) in pixels; only pictures of equal size share a call. unet_rows: 1, or 2 if
    guided. places: the rows of a call that it must occupy, None where the position does not matter.
    job: its `most_pictures` is the most of its pictures in one call, None without a limit.
    """

    @property
    def size(self) -> Hashable: ...  # noqa: D102
    @property
    def unet_rows(self) -> int: ...  # noqa: D102
    @property
    def places(self) -> tuple[int, ...] | None: ...  # noqa: D102
    @property
    def job(self) -> Any: ...  # noqa: D102


PictureT = TypeVar("PictureT", bound=Queued)


class BatchQueue(Generic[PictureT]):
    """The waiting and the running pictures, by size."""

    def __init__(self, most_rows: Callable[[Any], int]) -> None:
        """most_rows: called with a size before each call; returns the rows that it may have."""
        self._most_rows = most_rows
        self._ring: deque[Hashable] = deque()
        self._waiting: dict[Hashable, deque[PictureT]] = {}
        self._running: dict[Hashable, list[PictureT]] = {}
        self.waiting_count = 0

    @property
    def running_rows(self) -> int:
        """Return the U-Net rows of all running pictures."""
        return sum(
            picture.unet_rows
            for pictures in tuple(self._running.values())
            for picture in tuple(pictures)
        )

    @property
    def busy(self) -> bool:
        """Return whether any picture is running."""
        return any(self._running.values())

    def add(self, picture: PictureT) -> None:
        """Put a picture at the end of its size's queue."""
        if picture.size not in self._waiting:
            self._ring.append(picture.size)
            self._waiting[picture.size], self._running[picture.size] = deque(), []
        self._waiting[picture.size].append(picture)
        self.waiting_count += 1

    def next(self, *, admit: bool = True) -> tuple[list[PictureT], list[PictureT]]:
        """Return the pictures of the next call, and those of them that have just joined.

        Without `admit` none joins. Both lists are empty if nothing can run.
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

    def leave(self, picture: PictureT) -> None:
        """Remove a running picture, which has taken its last step."""
        self._running[picture.size].remove(picture)

    def drop(self, unwanted: Callable[[PictureT], bool]) -> None:
        """Remove every picture, waiting or running, for which `unwanted` is true."""
        for size, waiting in self._waiting.items():
            self._waiting[size] = deque(picture for picture in waiting if not unwanted(picture))
            self._running[size] = [
                picture for picture in self._running[size] if not unwanted(picture)
            ]
        self.waiting_count = sum(map(len, self._waiting.values()))

    def _admit(self, size: Hashable) -> list[PictureT]:
        running, waiting = self._running[size], self._waiting[size]
        free = self._most_rows(size) - sum(picture.unet_rows for picture in running)
        taken = {place for picture in running for place in picture.places or ()}
        joined: list[PictureT] = []
        passed: list[PictureT] = []
        while waiting and (free > 0 or not running):
            picture = waiting.popleft()
            if self._has_its_share(picture):
                passed.append(picture)
                continue
            fits = taken.isdisjoint(picture.places or ())
            taken.update(picture.places or ())  # a picture that waits for a place reserves it
            if picture.places is None and picture.unet_rows > free and running:
                passed.append(picture)
                break
            (joined if fits else passed).append(picture)
            if fits:
                running.append(picture)
                free -= picture.unet_rows
        waiting.extendleft(reversed(passed))
        self.waiting_count -= len(joined)
        return joined

    def _has_its_share(self, picture: PictureT) -> bool:
        most = picture.job.most_pictures
        if most is None:
            return False
        taken = sum(other.job is picture.job for other in self._running[picture.size])
        return bool(taken >= most)
