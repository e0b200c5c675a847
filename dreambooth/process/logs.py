"""What a command says besides its results: our log lines on stderr, without libraries' noise, and
the metrics of a job on stdout.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import select
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TextIO, cast

from dreambooth.errors import one_line

# They remark on what nobody asked for, such as optional packages that are not installed.
_NOISY = (
    *("httpx", "httpcore", "urllib3", "PIL", "bitsandbytes"),
    *("transformers", "diffusers", "accelerate", "huggingface_hub", "kernels"),
)
_MOST_MESSAGE_CHARACTERS = 8_000
_WARNINGS = "py.warnings"  # the logger of logging.captureWarnings
# Of lines that wait to be written: hours of a quiet server, seconds of a busy one.
_MOST_CHARACTERS = 1_000_000
_LAST_LINES_S = 1.0
# These set the level of their loggers anew while they are imported, from variables of their own.
_VERBOSITY = ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY")


def to_stderr(level: str, *, phase: str | None = None) -> None:
    """Send log lines from `level` on ("debug" .. "critical") to stderr, of libraries errors only.

    phase: what the lines of a job name until its recorder does. On a terminal each line wipes the
    progress bar that may stand there. May be called again.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        _OneLineTrace(
            _over_the_bar(sys.stderr) + "%(asctime)s %(levelname)s %(where)s%(message)s",
            datefmt="%H:%M:%S",
            defaults={"where": f"[{phase}] " if phase else ""},
        )
    )
    logging.setLogRecordFactory(_OneLineRecord)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    for variable in _VERBOSITY:
        os.environ.setdefault(variable, "error")
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)


class _OneLineRecord(logging.LogRecord):
    """A record whose message is one line: names of strangers' files stand in it.

    Cleaned here and not by our handler, because libraries bring handlers of their own.
    """

    def getMessage(self) -> str:
        message = super().getMessage()
        if self.name == _WARNINGS:  # a library's, with the line of its code
            message = " ".join(message.split())
        return one_line(message, _MOST_MESSAGE_CHARACTERS)


class _OneLineTrace(logging.Formatter):
    """Writes the trace of an error by `trace_of`."""

    def formatException(self, ei: Any) -> str:
        return trace_of(ei[1])


def trace_of(error: BaseException) -> str:
    """Return the trace of an error as Python prints it, each message in it on one line."""
    trace = traceback.TracebackException.from_exception(error)
    _clean_notes(trace)
    parts = []
    for part in trace.format():
        text = part.rstrip("\n")
        # Where the code stands is indented and has lines of its own; the rest is one message.
        lines = text.split("\n") if text.startswith("  ") else [text]
        parts += [one_line(line, _MOST_MESSAGE_CHARACTERS) for line in lines]
    return "\n".join(parts)


def _clean_notes(trace: traceback.TracebackException | None) -> None:
    """Put what is printed beside a message on one line each: notes, and the place of a fault."""
    if trace is None:
        return
    notes: Any = getattr(trace, "__notes__", None)
    trace.__notes__ = [f"  {one_line(str(note))}" for note in notes] if notes else notes
    for name in ("filename", "text", "msg"):  # of a SyntaxError
        if isinstance(value := getattr(trace, name, None), str):
            setattr(trace, name, one_line(value))
    for other in (trace.__cause__, trace.__context__, *(trace.exceptions or ())):
        _clean_notes(other)


def metric(line: str) -> None:
    """Print a line that SageMaker's metric definitions read: bare, at once, whatever the log level.

    A tuner without it has no objective, so it is a result on stdout and no remark.
    """
    print(f"{_over_the_bar(sys.stdout)}{line}\n", end="", flush=True)


def _over_the_bar(stream: TextIO) -> str:
    """What wipes the progress bar that may stand in a terminal's last line."""
    return "\r\033[K" if stream.isatty() else ""


@contextlib.contextmanager
def lasting_streams() -> Iterator[None]:
    """In the block a stdout or stderr that is closed, or lies on a full disk, costs words only."""
    before = _streams()
    sys.stdout, sys.stderr = (cast(TextIO, _Lasting(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in before:
            try:
                stream.flush()
            except (OSError, ValueError):  # Python's own flush at its exit would change the code
                with contextlib.suppress(OSError, ValueError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _streams() -> tuple[TextIO, TextIO]:
    """Return stdout and stderr, opened where the process was started with one that is closed."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    return sys.stdout, sys.stderr


@contextlib.contextmanager
def without_waiting() -> Iterator[Callable[[], int]]:
    """In the block stdout and stderr wait for no reader: what finds no room is dropped.

    A server writes lines for a pipe that somebody may have stopped to read, and must go on
    answering. Yields a function that returns how many lines were dropped so far.
    """
    before = _streams()
    streams = [_WithoutWaiting(stream) for stream in before]
    sys.stdout, sys.stderr = (cast(TextIO, stream) for stream in streams)
    try:
        yield lambda: sum(stream.dropped for stream in streams)
    finally:
        write_last_lines()
        sys.stdout, sys.stderr = before


def write_last_lines() -> None:
    """Wait a second at most until what was said is written, before a process ends by `os._exit`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, _WithoutWaiting):
            stream.wait_until_written(_LAST_LINES_S)


class _WithoutWaiting:
    """A text stream that a thread of its own writes out.

    Not through the stream's buffer: a thread that waits in there would hold its lock, and Python
    aborts where it cannot take that lock in the end.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._changed = threading.Condition()
        self._texts: list[str] = []
        self._characters = 0  # that are not written yet
        self.dropped = 0
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
        threading.Thread(target=self._write_out, name="log", daemon=True).start()

    def write(self, text: str) -> int:
        with self._changed:
            if self._characters + len(text) > _MOST_CHARACTERS:
                self.dropped += 1
            else:
                self._texts.append(text)
                self._characters += len(text)
                self._changed.notify_all()
        return len(text)

    def flush(self) -> None:
        """Nothing is waited for."""

    def wait_until_written(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._characters == 0, seconds)

    def _write_out(self) -> None:
        reported = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._texts)
                text, self._texts = "".join(self._texts), []
            self._write_now(text)
            with self._changed:
                self._characters -= len(text)
                self._changed.notify_all()
                if self._texts or reported == self.dropped:
                    continue
                lost, reported = self.dropped - reported, self.dropped
            now = time.strftime("%H:%M:%S")
            self._write_now(f"{now} WARNING {lost} lines were dropped: nobody read this log\n")

    def _write_now(self, text: str) -> None:
        """Write however long it takes; a reader that is gone costs the words."""
        data = memoryview(text.encode("utf-8", errors="backslashreplace"))
        with contextlib.suppress(OSError, ValueError):
            try:
                descriptor = self._stream.fileno()
            except io.UnsupportedOperation:  # it lies in memory
                self._stream.write(text)
                return
            while data:
                try:
                    data = data[os.write(descriptor, data) :]
                except BlockingIOError:  # whoever opened it wants nobody to wait in there
                    select.select([], [descriptor], [])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Lasting:
    """A text stream whose writes do not fail."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
