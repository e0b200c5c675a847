"""Stop signals: SIGTERM and SIGINT end a job at once, or where no work is lost by it.

AWS, "How Amazon SageMaker AI Signals Algorithms": SIGTERM, then 120 s, then SIGKILL. A signal
raises Stopped wherever the job is; inside `held()` it only leaves a note, which `check()` and the
end of the block turn into Stopped. A second signal ends the process at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

STOP_SECONDS = 100.0
"""Of the 120 s between SIGTERM and SIGKILL, what writing may take; the rest is for the way out."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """A stop signal arrived; no Exception, so that nothing on the way takes it for a fault."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(f"stopped by {number.name}")
        self.number = number

    @property
    def exit_code(self) -> int:
        """143 for SIGTERM, 130 for SIGINT, as a shell counts."""
        return 128 + self.number


class StopSignals:
    """Listens to the stop signals of one job."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        self._clock = clock
        self._leave = leave
        self._number: signal.Signals | None = None
        self._at = 0.0
        self._held = False

    @property
    def asked(self) -> bool:
        """Whether a signal has arrived."""
        return self._number is not None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Answer the signals during the block; outside of the main thread nothing can."""
        previous = []
        try:
            for number in _SIGNALS:
                before = signal.getsignal(number)
                if number == signal.SIGINT and before is signal.SIG_IGN:
                    continue  # a background job of a shell: Ctrl-C is meant for others
                signal.signal(number, self._answer)
                previous.append((number, before))
        except ValueError:  # not the main thread: the caller's handlers stand
            yield
            return
        try:
            with self._counted():
                yield
        finally:
            for number, before in previous:
                signal.signal(number, before)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """Leave at the second signal, whatever the main thread does.

        `_answer` runs between its calls only: two signals during a long one (a step, a file) are
        one to it.
        """
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        counter = threading.Thread(target=self._count, args=(reading,), daemon=True)
        counter.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            os.close(writing)
            counter.join()
            os.close(reading)

    def _count(self, reading: int) -> None:
        arrived = 0
        while number := os.read(reading, 1):
            arrived += number[0] in _SIGNALS
            if arrived > 1:
                self._leave(128 + number[0])

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Let a signal wait for the end of the block, or for `check()` inside it."""
        yield from self._with(held=True)

    @contextlib.contextmanager
    def released(self) -> Iterator[None]:
        """Inside a held block: work that may be broken off anywhere."""
        yield from self._with(held=False)

    def check(self) -> None:
        """Raise Stopped where a signal has arrived, also one that a library swallowed."""
        if self._number is not None:
            raise Stopped(self._number)

    def seconds_left(self) -> float:
        """Of STOP_SECONDS since the signal; all of them before one."""
        return STOP_SECONDS - (self._clock() - self._at if self.asked else 0.0)

    def _with(self, *, held: bool) -> Iterator[None]:
        before, self._held = self._held, held
        try:
            if not held:
                self.check()
            yield
        finally:
            self._held = before
        if not before:
            self.check()

    def _answer(self, number: int, frame: FrameType | None) -> None:
        if self._number is not None:
            return
        self._number, self._at = signal.Signals(number), self._clock()
        if not self._held:
            raise Stopped(self._number)
