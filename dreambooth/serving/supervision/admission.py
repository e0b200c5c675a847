"""Decide whether to accept a request, from the work ahead of it and the engine's speed.

A request that cannot be answered in time is refused at once instead of late. `finish_times`
simulates the engine's schedule (`serving.engine.batch_queue`): pictures of one size fill one U-Net
call, in their order, up to the engine's rows; the sizes alternate call by call; finished pictures
are decoded in between. This module is pure arithmetic.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from dreambooth.model_folder.facts import SMALLEST_UNIT
from dreambooth.serving.supervision.counters import RefusalReason

# An estimate is multiplied by this before it is compared with the deadline, because other noise
# schedulers, a busier machine, JSON and encoding take time too.
SAFETY: Final = 1.2
# Of the time allowed, for what is advised: a request is some time under way before it is judged.
ADVISED: Final = 0.95
# No client is asked to retry sooner.
SHORTEST_RETRY_S: Final = 1.0
# Attention grows with the square of the area: the FLOPs of a row at 1024 x 1024 over those at 512 x
# 512 are 4.675 / 0.804 = 4 ** 1.27. Below the measured size the plain area is close enough.
_AREA_POWER: Final = 1.27
_NO_CALLS: Final = 1e-6  # fewer U-Net calls than this count as none


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The remaining work for one picture.

    steps: the U-Net calls that are left, an estimate that may be fractional. rows: 2 with guidance,
    1 without. request_id, batch_size: at most batch_size pictures of one request share a call
    (None: as many as fit).
    """

    request_id: int
    rows: int
    steps: float
    width: int
    height: int
    batch_size: int | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Return (width, height); only pictures of equal size can share a call."""
        return self.width, self.height

    @property
    def pixels(self) -> int:
        """Return the area."""
        return self.width * self.height

    @property
    def share(self) -> float:
        """Return `batch_size` as a number, infinity for None."""
        return math.inf if self.batch_size is None else self.batch_size


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpeed:
    """The speed of the engine.

    seconds_per_call: (rows, seconds) of one U-Net call, at least one point. seconds_per_decode: of
    one picture. pixels: the area at which both were measured. rows: the most rows of a call.
    padded: every call costs as much as one of `rows` rows (exact mode).
    """

    seconds_per_call: tuple[tuple[int, float], ...]
    seconds_per_decode: float
    rows: int
    pixels: int
    padded: bool = False

    def decode_seconds(self, pixels: int) -> float:
        """Return the seconds to decode one picture, in proportion to its area.

        At 1024 x 1024 the FLOPs are 4.16 times those at 512 x 512.
        """
        return self.seconds_per_decode * pixels / self.pixels

    def seconds(self, rows: int, pixels: int) -> float:
        """Return the seconds of one call: interpolated linearly, then scaled by the area."""
        points = sorted(self.seconds_per_call)
        rows = max(rows, self.rows) if self.padded else rows
        place = bisect.bisect_left(points, (rows, 0.0))
        if place < len(points) and points[place][0] == rows:
            measured = points[place][1]
        elif place == 0 or place == len(points):  # fewer cost the same; more, in proportion
            nearest, seconds = points[0 if place == 0 else -1]
            measured = seconds if place == 0 else seconds * rows / nearest
        else:
            (low, before), (high, after) = points[place - 1], points[place]
            measured = before + (after - before) * (rows - low) / (high - low)
        ratio = pixels / self.pixels
        return measured * (ratio**_AREA_POWER if ratio > 1 else ratio)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """The limits for requests.

    max_queue: the most pictures that wait or are drawn at one time. request_timeout_s: the seconds
    in which a request must be answered. calls_per_step: how many U-Net calls the model's noise
    scheduler makes per step. min_steps: the fewest num_inference_steps that it takes. unit: the
    model's sides are multiples of so many pixels.
    """

    max_queue: int
    request_timeout_s: float
    calls_per_step: int = 1
    min_steps: int = 1
    unit: int = SMALLEST_UNIT


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """The reason why a request is not accepted, and a sentence for its client.

    retry_after_s: when to retry; None where no other time helps, but only another request.
    """

    reason: RefusalReason
    message: str
    retry_after_s: float | None


class _Schedule:
    """A simulation of the engine: the running and waiting pictures, and the calls left for each."""

    def __init__(self, work: Sequence[Work], most_rows: int) -> None:
        self.left = [picture.steps for picture in work]
        self.running: dict[tuple[int, int], list[int]] = {}
        self._work = work
        self._most_rows = most_rows
        # By size, groups of adjacent pictures of one request; a group is passed over as a whole.
        self._waiting: dict[tuple[int, int], deque[deque[int]]] = {}
        of_size: dict[tuple[int, int], list[int]] = {}
        for i, picture in enumerate(work):
            of_size.setdefault(picture.size, []).append(i)
        for size, indices in of_size.items():
            groups = itertools.groupby(indices, key=lambda i: (work[i].request_id, work[i].share))
            self._waiting[size] = deque(deque(group) for _, group in groups)

    def fill(self) -> bool:
        """Let pictures join while there is room; return whether any runs."""
        for size, waiting in tuple(self._waiting.items()):
            self._join(self.running.setdefault(size, []), waiting)
            if not waiting:
                del self._waiting[size]
        return bool(self.running)

    def _join(self, running: list[int], waiting: deque[deque[int]]) -> None:
        rows = self.rows(running)
        mates = Counter(self._work[i].request_id for i in running)
        passed: list[deque[int]] = []
        while waiting and (rows < self._most_rows or not running):
            picture = self._work[waiting[0][0]]
            if mates[picture.request_id] >= picture.share:
                passed.append(waiting.popleft())
            elif running and rows + picture.rows > self._most_rows:
                break  # the next one must not overtake it
            else:
                running.append(waiting[0].popleft())
                rows += picture.rows
                mates[picture.request_id] += 1
                if not waiting[0]:
                    waiting.popleft()
        waiting.extendleft(reversed(passed))

    def rows(self, running: Sequence[int]) -> int:
        """Return the U-Net rows of these pictures."""
        return sum(self._work[i].rows for i in running)

    def shortest(self) -> float:
        """Return the calls until the first of the running pictures is done."""
        return max(0.0, min(self.left[i] for running in self.running.values() for i in running))

    def advance(self, rounds: float) -> list[int]:
        """Let every size make `rounds` calls; return the indices of the pictures that are done."""
        done: list[int] = []
        for size, running in tuple(self.running.items()):
            for i in running:
                self.left[i] -= rounds
            done += [i for i in running if self.left[i] < _NO_CALLS]
            running[:] = [i for i in running if self.left[i] >= _NO_CALLS]
            if not running:
                del self.running[size]
        return done


def finish_times(work: Sequence[Work], speed: EngineSpeed) -> list[float]:
    """Return the seconds from now at which each picture would be done, in the order of `work`."""
    times = [0.0] * len(work)
    schedule = _Schedule(work, speed.rows)
    now = 0.0
    while schedule.fill():
        seconds_per_round = sum(
            speed.seconds(schedule.rows(running), width * height)
            for (width, height), running in schedule.running.items()
        )
        rounds = schedule.shortest()
        now += rounds * seconds_per_round
        for i in schedule.advance(rounds):
            now += speed.decode_seconds(work[i].pixels)
            times[i] = now
    return times


def after(work: Sequence[Work], speed: EngineSpeed, calls_made: int) -> list[Work]:
    """Return the same pictures with the steps that are left after `calls_made` U-Net calls.

    The engine reports how many calls it made, but not for which pictures, so this is simulated. A
    picture without remaining steps waits to be decoded.
    """
    schedule = _Schedule(work, speed.rows)
    calls_left = float(calls_made)
    while calls_left > _NO_CALLS and schedule.fill():
        sizes = len(schedule.running)
        rounds = min(schedule.shortest(), calls_left / sizes)
        calls_left -= rounds * sizes
        schedule.advance(rounds)
    return [
        replace(picture, steps=max(0.0, left))
        for picture, left in zip(work, schedule.left, strict=True)
    ]


def refuse(
    new: Sequence[Work],
    ahead: Sequence[Work],
    speed: EngineSpeed,
    bounds: Bounds,
    *,
    waited_s: float = 0.0,
) -> Refusal | None:
    """Return why the pictures `new` of one request are not accepted, or None if they are.

    ahead: the pictures that are being drawn or queued, in order. waited_s: how long ago the request
    arrived. It is accepted if and only if all pictures together are at most `max_queue`, and SAFETY
    times the estimate for its last picture is within the deadline.
    """
    allowed = bounds.request_timeout_s - waited_s
    alone = SAFETY * max(finish_times(new, speed))
    if len(new) > bounds.max_queue or alone > bounds.request_timeout_s:
        return _refusal_when_idle(new, speed, bounds, alone)
    excess = len(ahead) + len(new) - bounds.max_queue
    if excess > 0:
        return Refusal(
            reason="queue",
            message=(
                f"The queue is full: {len(ahead)} pictures are waiting or drawn, the server takes "
                f"{bounds.max_queue} (--max_queue), this request has {len(new)}."
            ),
            retry_after_s=_retry(sorted(finish_times(ahead, speed))[excess - 1]),
        )
    estimate = SAFETY * max(finish_times([*ahead, *new], speed)[len(ahead) :])
    if estimate > allowed:
        return Refusal(
            reason="deadline",
            message=(
                f"{'The server is busy: this' if ahead else 'This'} request would be done in "
                f"about {_shown(estimate)} s, but must be within {_shown(max(0.0, allowed))} s "
                f"(--request_timeout_s {bounds.request_timeout_s:g})."
            ),
            retry_after_s=_retry(estimate - bounds.request_timeout_s),
        )
    return None


def _refusal_when_idle(
    new: Sequence[Work], speed: EngineSpeed, bounds: Bounds, alone: float
) -> Refusal:
    """Return the refusal of a request that even an idle server could not answer, with advice."""
    limit = bounds.request_timeout_s
    if len(new) > bounds.max_queue:
        message = (
            f"The request has {len(new)} pictures, the server takes {bounds.max_queue} at once "
            "(--max_queue): ask for fewer pictures per request."
        )
    else:
        steps, side = _steps_that_fit(new, speed, bounds), _side_that_fits(new, speed, bounds)
        advice = [f"at most {steps} {'step' if steps == 1 else 'steps'}"] if steps else []
        advice += ["fewer pictures"] if len(new) > 1 else []
        advice += [f"at most {side} x {side} pixels"] if side else []
        asked = f"ask for {', or '.join(advice)}, or " if advice else ""
        message = (
            f"Even an idle server would need about {_shown(alone)} s for this request, but it must "
            f"be done within {limit:g} s: {asked}start the server with a longer "
            "--request_timeout_s."
        )
    return Refusal(reason="never", message=message, retry_after_s=None)


def _steps_that_fit(new: Sequence[Work], speed: EngineSpeed, bounds: Bounds) -> int:
    """Return the most num_inference_steps with which `new` alone is surely done in time, or 0."""

    def late(steps: int) -> bool:
        made = calls(steps, bounds.calls_per_step)
        return _is_late([replace(picture, steps=made) for picture in new], speed, bounds)

    longest = int(max(picture.steps for picture in new))
    steps = bisect.bisect_left(range(1, longest + 1), True, key=late)
    return steps if steps >= bounds.min_steps else 0


def _side_that_fits(new: Sequence[Work], speed: EngineSpeed, bounds: Bounds) -> int:
    """Return the longest side of squares with which `new` alone is surely done in time, or 0."""

    def late(units: int) -> bool:
        side = units * bounds.unit
        square = [replace(picture, width=side, height=side) for picture in new]
        return _is_late(square, speed, bounds)

    longest = math.isqrt(max(picture.pixels for picture in new)) // bounds.unit
    return bounds.unit * bisect.bisect_left(range(1, longest + 1), True, key=late)


def _is_late(work: Sequence[Work], speed: EngineSpeed, bounds: Bounds) -> bool:
    return SAFETY * max(finish_times(work, speed)) > ADVISED * bounds.request_timeout_s


def calls(num_inference_steps: int, calls_per_step: int = 1) -> int:
    """Return a picture's U-Net calls; the extra one is PNDM's, or covers the text encoder."""
    return num_inference_steps * calls_per_step + 1


def _retry(seconds: float) -> float:
    return round(max(SHORTEST_RETRY_S, seconds), 1)


def _shown(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds < 10 else f"{seconds:.0f}"
