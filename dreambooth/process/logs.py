"""Write log lines to stderr, without libraries' noise, and a job's metrics to stdout."""

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
from pathlib import Path
from typing import Any, Literal, TextIO, cast

from dreambooth.errors import ResourceError, one_line

# They log what no user needs, such as optional packages that are not installed.
_NOISY = (
    *("httpx", "httpcore", "urllib3", "bitsandbytes"),
    *("transformers", "diffusers", "accelerate", "huggingface_hub", "kernels"),
)
_MOST_MESSAGE_CHARACTERS = 8_000
_WARNINGS = "py.warnings"  # the logger of logging.captureWarnings
# Lines waiting to be written, at most: hours of a quiet server, seconds of a busy one.
_MOST_CHARACTERS = 1_000_000
_LAST_LINES_S = 1.0
# When these libraries are imported, they set their loggers' levels from these variables.
_VERBOSITY = ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY")


def to_stderr(level: str, *, phase: str | None = None) -> None:
    """Send log lines from `level` on ("debug" .. "critical") to stderr.

    Of the noisy libraries only errors are logged. phase: shown in a job's lines until its run
    report sets one. On a terminal each line erases a progress bar on the same line. May be
    called again.
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
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # it raises its errors too


class _OneLineRecord(logging.LogRecord):
    """A log record whose message is one printable line, as it may quote untrusted files' names.

    The message is cleaned here and not by our handler, because libraries bring their own handlers.
    """

    def getMessage(self) -> str:
        message = super().getMessage()
        if self.name == _WARNINGS:  # a library's warning, with its line of code
            message = " ".join(message.split())
        return one_line(message, _MOST_MESSAGE_CHARACTERS)


class _OneLineTrace(logging.Formatter):
    """A formatter that writes the trace of an error with `trace_of`."""

    def formatException(self, ei: Any) -> str:
        return trace_of(ei[1])


def trace_of(error: BaseException) -> str:
    """Return the trace of an error as Python prints it, but with each message on one line."""
    trace = traceback.TracebackException.from_exception(error)
    _clean_notes(trace)
    parts = []
    for part in trace.format():
        text = part.rstrip("\n")
        # Indented parts show places in the code, a line each; any other part is one message.
        lines = text.split("\n") if text.startswith("  ") else [text]
        parts += [one_line(line, _MOST_MESSAGE_CHARACTERS) for line in lines]
    return "\n".join(parts)


def _clean_notes(trace: traceback.TracebackException | None) -> None:
    """Put what is printed beside a message on one line each: notes, and a SyntaxError's place."""
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
    """Print a line that SageMaker's metric definitions match: bare, at once, at every log level.

    A tuner without it has no objective, so it is a result on stdout and not a log line.
    """
    print(f"{_over_the_bar(sys.stdout)}{line}\n", end="", flush=True)


def _over_the_bar(stream: TextIO) -> str:
    """Return the codes that erase a progress bar in a terminal's last line; no text elsewhere."""
    return "\r\033[K" if stream.isatty() else ""


@contextlib.contextmanager
def fault_tolerant_streams(*names: Literal["stdout", "stderr"]) -> Iterator[None]:
    """During the block, drop text instead of failing if these streams cannot be written."""
    open_closed_streams()
    before: dict[str, TextIO] = {name: getattr(sys, name) for name in names}
    for name, stream in before.items():
        setattr(sys, name, _FaultTolerantStream(stream))
    try:
        yield
    finally:
        for name, stream in before.items():
            setattr(sys, name, stream)
            _drop_what_is_left(stream)


@contextlib.contextmanager
def copied_into(path: Path) -> Iterator[None]:
    """During the block, also append to a file, line by line, what goes to stdout and stderr.

    A stream that is that file already is not copied. Of a progress bar the file gets the last
    state. Text that the file does not take is dropped. Raises OSError if it cannot be opened.
    """
    before: dict[str, TextIO] = {"stdout": sys.stdout, "stderr": sys.stderr}
    with path.open("ab", buffering=0) as file:
        copies = {
            name: _CopiedStream(stream, file)
            for name, stream in before.items()
            if not _is_open_file(stream, file)
        }
        for name, copy in copies.items():
            setattr(sys, name, copy)
        try:
            yield
        finally:
            for name, copy in copies.items():
                setattr(sys, name, before[name])
                copy.end_line()


def _is_open_file(stream: TextIO, file: io.FileIO) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), os.fstat(file.fileno()))
    except (OSError, ValueError):  # a stream in memory
        return False


@contextlib.contextmanager
def stdout_faults_told() -> Iterator[None]:
    """Raise ResourceError after the block if what it printed could not be written to stdout.

    A reader that has left, such as `head`, is no fault. argparse ends the block with SystemExit.
    """
    before, stream = sys.stdout, _FaultTolerantStream(sys.stdout)
    sys.stdout = cast(TextIO, stream)
    try:
        yield
    except SystemExit:
        stream.flush()
        if stream.fault is None:
            raise
    finally:
        stream.flush()
        sys.stdout = before
        _drop_what_is_left(before)
    if stream.fault is not None:
        reason = stream.fault.strerror or stream.fault
        raise ResourceError(
            f"Nothing can be written to standard output ({reason}): send it to another place."
        )


def _drop_what_is_left(stream: TextIO) -> None:
    try:
        stream.flush()
    except (OSError, ValueError):  # Python's flush at exit would fail too
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def open_closed_streams() -> None:
    """Open the null device in place of every standard stream that was closed at the start.

    Call it before anything else is opened. Otherwise the next file or socket takes the stream's
    number, and libraries and child processes write what they have to say into that.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115


@contextlib.contextmanager
def non_blocking_streams() -> Iterator[Callable[[], int]]:
    """During the block, let stdout and stderr drop lines rather than wait for a reader.

    A server must go on answering even if nobody reads the pipe that its log lines go to. Yields a
    function that returns how many lines have been dropped so far.
    """
    open_closed_streams()
    before = sys.stdout, sys.stderr
    streams = [_NonBlockingStream(stream) for stream in before]
    sys.stdout, sys.stderr = (cast(TextIO, stream) for stream in streams)
    try:
        yield lambda: sum(stream.dropped for stream in streams)
    finally:
        write_last_lines()
        sys.stdout, sys.stderr = before


def write_last_lines() -> None:
    """Wait, at most a second per stream, until all lines are written; call it before `os._exit`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, _NonBlockingStream):
            stream.wait_until_written(_LAST_LINES_S)


class _NonBlockingStream:
    """A text stream whose writes never block, because its own thread writes the text out.

    The thread bypasses the stream's buffer: while it blocked there it would hold the buffer's lock,
    and Python aborts if it cannot take that lock at exit.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._changed = threading.Condition()
        self._texts: list[str] = []
        self._characters = 0  # not written yet
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
        """Do nothing, as waiting for the thread could block."""

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
        """Write the text, however long it takes; drop it if the reader is gone."""
        data = memoryview(text.encode("utf-8", errors="backslashreplace"))
        with contextlib.suppress(OSError, ValueError):
            try:
                descriptor = self._stream.fileno()
            except io.UnsupportedOperation:  # a stream in memory
                self._stream.write(text)
                return
            while data:
                try:
                    data = data[os.write(descriptor, data) :]
                except BlockingIOError:  # the descriptor was opened as non-blocking
                    select.select([], [descriptor], [])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _CopiedStream:
    """A text stream that also appends its lines to a file, without the codes of a progress bar."""

    def __init__(self, stream: TextIO, file: io.FileIO) -> None:
        self._stream = stream
        self._file = file
        self._line = ""

    def write(self, text: str) -> int:
        *lines, self._line = f"{self._line}{text}".split("\n")
        if lines:
            self._append("".join(f"{_without_codes(line)}\n" for line in lines))
        self._line = self._line[self._line.rfind("\r") + 1 :]
        return self._stream.write(text)

    def end_line(self) -> None:
        if line := _without_codes(self._line):
            self._append(f"{line}\n")
        self._line = ""

    def _append(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._file.write(text.encode("utf-8", errors="backslashreplace"))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _without_codes(line: str) -> str:
    """Return what a terminal shows of a line in the end."""
    return line[line.rstrip("\r").rfind("\r") + 1 :].replace("\033[K", "").rstrip()


class _FaultTolerantStream:
    """A text stream that drops text instead of raising OSError.

    fault: the last such error but that of a reader that has left.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.fault: OSError | None = None

    def write(self, text: str) -> int:
        with self._tolerance():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._tolerance():
            self._stream.flush()

    @contextlib.contextmanager
    def _tolerance(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            pass
        except OSError as error:
            self.fault = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
