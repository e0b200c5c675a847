from __future__ import annotations

import errno
import io
import itertools
import logging
import os
import struct
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import TiffImagePlugin

from dreambooth.process import logs

ROOT = Path(__file__).parents[2]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _root_logger_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    for handler in handlers:  # otherwise basicConfig would close them
        root.removeHandler(handler)
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY", raising=False)
    monkeypatch.delenv("DIFFUSERS_VERBOSITY", raising=False)
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_lines_from_the_level_on_arrive_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    logs.to_stderr("warning")
    logs.to_stderr("info")
    logging.getLogger("dreambooth.anything").info("hello")
    logging.getLogger("dreambooth.anything").debug("unheard")
    (line,) = stream.getvalue().splitlines()
    assert line.endswith(" INFO hello")


def test_pythons_warnings_are_log_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)  # as an earlier test left it
        logs.to_stderr("info")
        warnings.warn("two\nlines", UserWarning, stacklevel=1)
        logging.captureWarnings(False)
    (line,) = stream.getvalue().splitlines()
    assert " WARNING " in line
    assert "two" in line


def test_on_a_terminal_a_line_wipes_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    logs.to_stderr("info")
    logging.getLogger("dreambooth").info("hello")
    assert stream.getvalue().startswith("\r\033[K")


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_a_metric_is_a_bare_line_on_stdout_at_any_level(
    stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.to_stderr("critical")
    monkeypatch.setattr(sys, "stdout", stream)
    logs.metric("fid_score=1.5")
    wiped = "\r\033[K" if stream.isatty() else ""
    assert stream.getvalue() == f"{wiped}fid_score=1.5\n"
    assert capsys.readouterr().err == ""


def test_a_metric_does_not_wait_in_a_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written))
    logs.metric("fid_score=1.5")
    assert written.getvalue() == b"fid_score=1.5\n"


@pytest.mark.parametrize("name", ["bitsandbytes", "bitsandbytes.backends.cpu.ops", "httpx"])
def test_of_libraries_only_errors_are_logged(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    logs.to_stderr("debug")
    logging.getLogger(name).warning("Failed to load something nobody needs")
    logging.getLogger(name).error("broken")
    (line,) = stream.getvalue().splitlines()
    assert line.endswith(" ERROR broken")


def test_what_pillow_raises_is_not_logged_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    logs.to_stderr("debug")
    tags = ((256, 4), (257, 4), (277, 60_000))  # width, height, samples per pixel
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    tiff = b"II*\0" + struct.pack("<IH", 8, len(tags)) + table + bytes(4)
    with pytest.raises(SyntaxError):
        TiffImagePlugin.TiffImageFile(io.BytesIO(tiff))
    assert stream.getvalue() == ""


def test_libraries_that_set_their_own_level_are_quiet_too() -> None:
    code = (
        "import logging; from dreambooth.process import logs; logs.to_stderr('info')\n"
        "import transformers, diffusers\n"
        "from transformers.utils import logging as t; from diffusers.utils import logging as d\n"
        "t.get_logger('transformers.x').warning('noise')\n"
        "d.get_logger('diffusers.x').warning('noise')\n"
        "t.get_logger('transformers.x').error('broken')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "noise" not in done.stderr
    assert "broken" in done.stderr


@contextmanager
def stderr_as_a_pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Yield the reading end of a pipe that takes stderr's place in the block."""
    reading, writing = os.pipe()
    with open(writing, "w") as stream, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", stream)
        yield reading
    os.close(reading)


def test_a_log_that_nobody_reads_blocks_nothing_and_reports_what_was_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with stderr_as_a_pipe(monkeypatch) as pipe, logs.non_blocking_streams() as dropped:
        logs.to_stderr("info")
        line = "x" * 1000
        for _ in range(3000):  # more than the pipe and the queue in front of it hold
            logging.getLogger("dreambooth").info(line)
        lost = dropped()
        assert 1000 < lost < 3000
        told = f"WARNING {lost} lines were dropped: nobody read this log".encode()
        read = b""
        while told not in read:
            read += os.read(pipe, 1 << 16)
        assert read.count(line.encode()) == 3000 - lost
        logging.getLogger("dreambooth").info("somebody reads again")
        assert b"somebody reads again" in os.read(pipe, 1 << 16)
        assert dropped() == lost


def test_the_last_lines_are_written_before_the_block_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with stderr_as_a_pipe(monkeypatch) as pipe:
        with logs.non_blocking_streams():
            logs.to_stderr("info")
            logging.getLogger("dreambooth").info("the reason, with \udc80 in it")
            print("and more", file=sys.stderr)
        assert b"the reason, with \\udc80 in it\nand more\n" in os.read(pipe, 1 << 16)


def test_a_process_ends_although_nobody_reads_its_log() -> None:
    code = (
        "import sys; from dreambooth.process import logs\n"
        "with logs.non_blocking_streams():\n"
        "    for _ in range(3000): print('x' * 1000, file=sys.stderr)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.wait(30) == 0
    assert process.stderr is not None
    assert process.stdout is not None
    process.stderr.close()
    process.stdout.close()


def test_what_was_said_before_a_hard_exit_is_written() -> None:
    code = (
        "import logging, os; from dreambooth.process import logs\n"
        "with logs.non_blocking_streams():\n"
        "    logs.to_stderr('info'); logging.error('the reason')\n"
        "    logs.write_last_lines(); os._exit(1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "the reason" in done.stderr


def test_a_pipe_that_never_waits_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe may have been opened with O_NONBLOCK; here it fills up now and then."""
    with stderr_as_a_pipe(monkeypatch) as pipe:
        os.set_blocking(sys.stderr.fileno(), False)
        with logs.non_blocking_streams() as dropped:
            logs.to_stderr("info")
            for number in range(500):
                logging.getLogger("dreambooth").info("%d %s", number, "x" * 1000)
            read = b""
            while b" 499 x" not in read or not read.endswith(b"x\n"):
                read += os.read(pipe, 4096)
            assert dropped() == 0
        assert read.count(b"x\n") == 500


@pytest.mark.parametrize("kind", [io.StringIO, "closed"])
def test_streams_without_a_number_and_closed_ones_are_fine(
    monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    stream = None if kind == "closed" else kind()
    monkeypatch.setattr(sys, "stderr", stream)
    with logs.non_blocking_streams():
        logs.to_stderr("info")
        logging.getLogger("dreambooth").info("hello")
    if stream is not None:
        assert stream.getvalue().endswith(" INFO hello\n")


@pytest.mark.parametrize(
    "closed", [set(some) for size in range(4) for some in itertools.combinations(range(3), size)]
)
def test_no_file_takes_the_number_of_a_closed_stream(closed: set[int]) -> None:
    code = """
import os, subprocess, sys
from dreambooth.process import logs
logs.open_closed_streams()
file = os.open(os.devnull, os.O_RDONLY)
assert file > 2
for stream in (sys.stdout, sys.stderr):
    print("text", file=stream, flush=True)
sys.stdin.readline()
child = "import sys; assert None not in (sys.stdin, sys.stdout, sys.stderr)"
sys.exit(subprocess.run([sys.executable, "-c", child]).returncode + 10)
"""
    closing = " ".join(f"{number}>&-" for number in closed)
    done = subprocess.run(
        ["bash", "-c", f'exec "$@" {closing}', "-", sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 10, done.stderr
    expected = ["" if number in closed else "text\n" for number in (1, 2)]
    assert [done.stdout, done.stderr] == expected


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EBADF])
def test_only_the_named_streams_drop_what_cannot_be_written(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(number, os.strerror(number))

    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Broken())
    with logs.fault_tolerant_streams("stderr"):
        print("text", file=sys.stderr)
        with pytest.raises(OSError, match=os.strerror(number)):
            print("text")
    with logs.fault_tolerant_streams("stdout", "stderr"):
        print("text")
    assert isinstance(sys.stdout, Broken)
    assert isinstance(sys.stderr, Broken)


class TerminalStream(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_copy_has_every_line_once_and_of_a_bar_its_last_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log.txt"
    terminal = TerminalStream()
    with log.open("a") as stderr:
        monkeypatch.setattr("sys.stdout", terminal)
        monkeypatch.setattr("sys.stderr", stderr)
        with logs.copied_into(log):
            for text in ("one\ntw", "o\n", "\rbar 1/2  ", "\rbar 2/2 \n", "\r\033[Kmetric=1\n"):
                print(text, end="")
            print("straight into the file", file=sys.stderr, flush=True)
            print("no line end", end="")
            assert sys.stdout.isatty()
        assert (sys.stdout, sys.stderr) == (terminal, stderr)
    assert terminal.getvalue().count("bar") == 2
    assert log.read_text() == "one\ntwo\nbar 2/2\nmetric=1\nstraight into the file\nno line end\n"
