from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import dreambooth
from dreambooth.__main__ import main
from dreambooth.tiny import DATA

ROOT = Path(__file__).parents[1]


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dreambooth", *argv], capture_output=True, text=True, cwd=ROOT
    )


def test_hyperparameters_as_json_is_one_flat_object_published_names_first() -> None:
    done = run("hyperparameters", "--format", "json")
    table = json.loads(done.stdout)
    assert list(table)[:3] == ["with_prior_preservation", "num_class_images", "epochs"]
    assert table["learning_rate"] == "2e-06"
    assert table["max_steps"] == "None"
    assert set(map(type, table.values())) == {str}


@pytest.mark.parametrize("kind", ["text", "json", "markdown"])
def test_hyperparameters_loads_no_torch(kind: str) -> None:
    code = (
        "import sys; from dreambooth.__main__ import main; "
        f"main(['hyperparameters', '--format', '{kind}']); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m dreambooth hyperparameters | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stderr == ""
    assert done.stdout == "published:\n"


class Unwritable(io.StringIO):
    """A stream whose disk is full or whose reader has left."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))


class UnwritableFile(io.RawIOBase):
    """The same below Python's buffers: it is the flush that fails."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC, errno.EIO])
def test_a_stderr_that_cannot_be_written_changes_no_exit_code(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", Unwritable(number))
    assert main(["hyperparameters"]) == 0
    assert main(["generate", "--model", "/nowhere", "--prompt", "x", "--seed", "a"]) == 1
    assert main(["benchmark"]) == 2


@pytest.fixture
def printing(tmp_path: Path, small_model_folder: Path) -> dict[str, list[str]]:
    """Return arguments with which verbs print and end at once."""
    model, out = str(small_model_folder), str(tmp_path / "out")
    return {
        "hyperparameters": ["--format", "json"],
        "convert": [model, out],
        "pack": [model, f"{out}.tar.gz"],
        "serve": ["--help"],
        "demo": ["--help"],
        "--help": [],
        "--version": [],
    }


VERBS = ("hyperparameters", "convert", "pack", "serve", "demo", "--help", "--version")


@pytest.mark.parametrize("buffered", [False, True])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EBADF])
@pytest.mark.parametrize("verb", VERBS)
def test_a_stdout_that_cannot_be_written_is_one_sentence(
    verb: str,
    number: int,
    buffered: bool,
    printing: dict[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What the verb was to write is there nevertheless, and the advice is not about its disk."""
    stdout: io.TextIOBase = Unwritable(number)
    if buffered:
        stdout = io.TextIOWrapper(io.BufferedWriter(UnwritableFile(number)))
    monkeypatch.setattr(sys, "stdout", stdout)
    assert main([verb, *printing[verb]]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    said = f"standard output ({os.strerror(number)}): send it to another place."
    assert last == f"error: Nothing can be written to {said}"
    for made in ({"convert": printing[verb][1:], "pack": printing[verb][1:]}).get(verb, ()):
        assert Path(made).exists()
    monkeypatch.undo()


@pytest.mark.parametrize("verb", VERBS)
def test_a_reader_that_has_left_is_no_fault(
    verb: str,
    printing: dict[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdout", Unwritable(errno.EPIPE))
    with contextlib.suppress(SystemExit):  # of argparse, after its help
        assert main([verb, *printing[verb]]) == 0
    assert "error" not in capsys.readouterr().err
    monkeypatch.undo()


def test_a_job_goes_on_without_its_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", Unwritable(errno.ENOSPC))
    data = str(DATA / "cat")
    assert main(["train", "--dry-run", "--pretrained-model", "tiny", "--train", data]) == 0
    assert "error" not in capsys.readouterr().err


@pytest.mark.parametrize("buffering", ["", "1"])
def test_a_process_with_a_full_stdout_says_so_once(buffering: str) -> None:
    command = f"{sys.executable} -m dreambooth --help >/dev/full"
    environ = {**os.environ, "PYTHONUNBUFFERED": buffering}
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, cwd=ROOT, env=environ
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "standard output (No space left on device)" in done.stderr


def test_the_version_is_the_packages() -> None:
    assert run("--version").stdout.strip() == dreambooth.__version__


def test_train_is_the_training_entry_point(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--train", "no-such-folder", "--max_steps", "0"]) == 1
    assert "max_steps" in capsys.readouterr().err


def test_convert_turns_old_weights_into_safetensors(
    make_model_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = make_model_folder(bin=True)
    out = tmp_path / "new"
    assert main(["convert", str(old), str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert list(out.rglob("*.safetensors"))
    assert not list(out.rglob("*.bin"))


def test_an_error_is_one_sentence_and_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(tmp_path / "none"), str(tmp_path / "out")]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert str(tmp_path / "none") in shown


def test_an_interrupt_is_one_line_and_exit_code_130(
    small_model_folder: Path, tmp_path: Path
) -> None:
    argv = ["--model", str(small_model_folder), "--prompt", "a cat", "--count", "10000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dreambooth", "generate", *argv, "--out", str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # SIGINT is ignored where the tests run in the background, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    assert " generate: 0/" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 130, shown
    *progress, last = shown.splitlines()
    assert last == "stopped by SIGINT"
    assert all(" generate: " in line for line in progress)


def test_generate_prints_nothing_but_its_progress_and_warnings_of_ours(
    small_model_folder: Path, tmp_path: Path
) -> None:
    options = ("--steps", "1", "--seed", "1", "--out", str(tmp_path))
    prompt = "a photo of a cat " * 50
    done = run("generate", "--model", str(small_model_folder), "--prompt", prompt, *options)
    assert done.returncode == 0
    kinds = [line.split()[1] for line in done.stderr.splitlines()]
    assert sorted(kinds) == ["WARNING", "generate:", "generate:"]
