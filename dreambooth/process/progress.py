"""Show progress as a bar on a terminal, and as a plain line every few seconds elsewhere."""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self, TextIO

# The speed shown is that of these last seconds, so that a slow start soon stops counting.
_WINDOW_S: Final = 30.0
_SAMPLE_S: Final = 0.25
# A redraw costs a system call, and the eye needs no more than ten per second.
_REDRAW_S: Final = 0.1
_MAX_BAR_CELLS: Final = 24


class Progress:
    """Shows how much of a task of ``total`` units is done, its speed and the time left.

    On a terminal one line is redrawn: label, bar, done/total, fields, units per second, time left.
    Elsewhere (logs) a line, with the time of day, is written at the start, every ``interval_s``
    seconds and at the end. Use it as a context manager. ``initial`` units were done before this run
    and do not count for the speed.
    """

    def __init__(
        self,
        total: int,
        label: str,
        *,
        stream: TextIO,
        clock: Callable[[], float] = time.monotonic,
        interval_s: float = 5.0,
        initial: int = 0,
        unit: str = "steps",
    ) -> None:
        self._total = total
        self._label = label
        self._stream = stream
        self._clock = clock
        self._unit = unit
        self._terminal = stream.isatty()
        self._interval_s = _REDRAW_S if self._terminal else interval_s
        self._bar_cells = "█·" if _encodes(stream, "█·") else "#-"
        self._initial = self._done = initial
        self._fields = ""
        self._width = 0
        self._closed = False
        self._start = self._now = self._shown_at = clock()
        self._seen: deque[tuple[float, int]] = deque([(self._start, initial)])
        self._show()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def update(self, done: int, **fields: float | str) -> None:
        """Set how many units are done (an absolute count) and the fields beside the bar."""
        self._now = now = self._clock()
        self._done = done
        self._fields = "".join(f"  {name} {_shown(value)}" for name, value in fields.items())
        if now - self._seen[-1][0] >= _SAMPLE_S:
            self._seen.append((now, done))
        while len(self._seen) > 1 and now - self._seen[1][0] >= _WINDOW_S:
            self._seen.popleft()
        if now - self._shown_at >= self._interval_s:
            self._shown_at = now
            self._show()

    def close(self) -> None:
        """Show the last state and end the line; further calls do nothing."""
        if self._closed:
            return
        self._closed = True
        self._now = self._clock()
        self._show()
        if self._terminal:
            self._stream.write("\n")
            self._stream.flush()

    def _show(self) -> None:
        if not self._terminal:
            when = time.strftime("%H:%M:%S")  # log lines begin the same way
            self._stream.write(f"{when} {self._label}: {self._status()}\n")
            self._stream.flush()
            return
        status = self._status()
        columns = shutil.get_terminal_size().columns - 1
        cells = min(_MAX_BAR_CELLS, columns - len(self._label) - len(status) - 4)
        bar = f" |{self._bar(cells)}|" if cells >= 4 else ""
        line = f"{self._label}{bar} {status}"[: max(columns, 1)]
        # Spaces erase the rest of a longer line; \r works where escape codes do not.
        self._stream.write("\r" + line + " " * (self._width - len(line)))
        self._stream.flush()
        self._width = len(line)

    def _bar(self, cells: int) -> str:
        share = min(max(self._done / self._total, 0.0), 1.0) if self._total > 0 else 1.0
        full = int(share * cells)
        return self._bar_cells[0] * full + self._bar_cells[1] * (cells - full)

    def _status(self) -> str:
        text = f"{self._done}/{self._total}{self._fields}"
        speed = self._units_per_second()
        if speed > 0:
            text += f"  {_decimal(speed)} {self._unit}/s"
        if self._closed:
            return f"{text}  in {_duration(self._now - self._start)}"
        if speed > 0:
            text += f"  {_duration(max(self._total - self._done, 0) / speed)} left"
        return text

    def _units_per_second(self) -> float:
        """Return the speed over the recent window, or over the whole run once closed."""
        then, before = (self._start, self._initial) if self._closed else self._seen[0]
        seconds = self._now - then
        return (self._done - before) / seconds if seconds > 0 else 0.0


def _encodes(stream: TextIO, text: str) -> bool:
    try:
        text.encode(stream.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _decimal(number: float) -> str:
    """Format with three significant digits: ``0.0512``, ``4.21``; from 100 on as a whole number."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def _shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def _duration(seconds: float) -> str:
    """Format as ``0:07``, ``12:30`` or ``1:02:03``; times above 1,000 days are shown as 1,000."""
    whole = round(min(seconds, 86_400_000.0))
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours}:{minutes:02}:{whole % 60:02}"
    return f"{minutes}:{whole % 60:02}"
