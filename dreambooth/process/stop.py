"""Handle stop signals: end a job at once, or at the next point where no work is lost.

AWS, "How Amazon SageMaker AI Signals Algorithms": SIGTERM, then 120 s, then SIGKILL. A signal
raises Stopped wherever the job is. Inside `held()` it is only noted, and `check()` or the end of
the block raises Stopped. A second signal ends the process at once, unless it is SIGHUP: a terminal
that closes sends it once or twice.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

STOP_SECONDS = 100.0
"""Of the 120 s between SIGTERM and SIGKILL, what writing may take; the rest is for the way out."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def answered(*, always: Sequence[signal.Signals] = (signal.SIGTERM,)) -> list[signal.Signals]:
    """Return the stop signals that this process should answer.

    Those that it was started to ignore are left out, except `always`: a shell's background job
    ignores SIGINT (Ctrl-C is not meant for it), and a process under `nohup` ignores SIGHUP.
    """
    return [
        number
        for number in _SIGNALS
        if number in always or signal.getsignal(number) is not signal.SIG_IGN
    ]


def signal_of(code: int) -> signal.Signals | None:
    """Return the stop signal that a process of this exit code has ended by, None if by none.

    code: 128 and the signal's number, or that number below zero where nothing handled it.
    """
    return next((number for number in _SIGNALS if code in (128 + number, -number)), None)


class Stopped(BaseException):
    """A stop signal arrived. It is no Exception, so that no `except Exception` catches it."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(f"stopped by {number.name}")
        self.number = number

    @property
    def exit_code(self) -> int:
        """Return 143 for SIGTERM, 130 for SIGINT and 129 for SIGHUP, as shells do."""
        return 128 + self.number


class StopSignals:
    """Handles the stop signals of one job."""

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
        """Return whether a signal has arrived."""
        return self._number is not None

    @property
    def number(self) -> signal.Signals | None:
        """Return the first signal that has arrived."""
        return self._number

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals during the block; outside the main thread none can be handled."""
        previous = []
        try:
            for number in answered():
                previous.append((number, signal.signal(number, self._answer)))
        except ValueError:  # not the main thread: the caller's handlers stay
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
        """End the process at the second signal, whatever the main thread is doing.

        `_answer` cannot do this: it runs only between the main thread's calls, and two signals
        during one long call (a step, a file) reach it as one.
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
        arrived = False
        while number := os.read(reading, 1):
            if number[0] not in _SIGNALS:
                continue
            if arrived and number[0] != signal.SIGHUP:
                self._leave(128 + number[0])
            arrived = True

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Delay a signal until the end of the block, or until a `check()` inside it."""
        yield from self._with(held=True)

    @contextlib.contextmanager
    def released(self) -> Iterator[None]:
        """Inside a held block, let a signal interrupt this block anywhere."""
        yield from self._with(held=False)

    def check(self) -> None:
        """Raise Stopped if a signal has arrived, even if a library swallowed an earlier Stopped."""
        if self._number is not None:
            raise Stopped(self._number)

    def seconds_left(self) -> float:
        """Return what is left of STOP_SECONDS since the signal; all of them before a signal."""
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
