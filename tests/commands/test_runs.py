"""`python -m dreambooth runs` with stand-in trainers."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dreambooth.__main__ import main
from dreambooth.runs.run_folder import Run, RunState
from dreambooth.runs.run_list import RunList
from dreambooth.tiny import DATA
from tests.runs.processes import kill, runners, settings, trainers, wait_until, with_stand_ins

Verb = Callable[..., dict[str, Any]]


@pytest.fixture
def verb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Verb]:
    """Yield a function that runs an action and returns what it prints as JSON."""
    with_stand_ins(monkeypatch)

    def run(action: str, *argv: str) -> dict[str, Any]:
        assert main(["runs", "--dir", str(tmp_path), action, *argv, "--json"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        assert found["dir"] == str(tmp_path)
        assert isinstance(found["runner"], bool)
        return found

    yield run
    kill(runners(tmp_path))
    kill(trainers(tmp_path))


def test_the_whole_story(verb: Verb, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verb("list")["runs"] == []
    given = ["--train", str(DATA / "cat"), "--pretrained-model", "tiny", "--max_steps", "15"]
    found = verb("start", *given, "--name", "cat")
    assert (found["added"], found["runner"]) == (["0001-cat"], True)
    run = Run(tmp_path / "0001-cat")
    wait_until(lambda: run.last_metrics().get("step", 0) > 1)
    (one,) = verb("list")["runs"]
    assert (one["state"], one["steps"], one["failure"]) == ("running", 15, "")
    (stopped,) = verb("stop", "0001-cat")["stopped"]
    assert (stopped["state"], stopped["has_model"]) == ("stopped", False)
    step = stopped["checkpoint_step"]
    assert stopped["sentence"] == (
        f"The run is stopped. It has a checkpoint of step {step}, from which it can go on."
    )
    assert verb("continue", "0001-cat", "--max_steps=20")["checkpoint_step"] == step
    wait_until(lambda: run.state() == RunState.DONE)
    assert verb("again", "0001-cat", "--max_steps=2", "--name=short")["added"] == ["0002-short"]
    wait_until(lambda: Run(tmp_path / "0002-short").state() == RunState.DONE)
    assert [one["step"] for one in verb("list")["runs"]] == [20, 2]
    shown = verb("show", "0001-cat")["run"]
    assert shown["settings"] == {**settings(), "max_steps": "20"}
    assert (shown["plan"], shown["report"], shown["draft"]) == ([["steps", "20"]], None, {})
    assert shown["log"][-1].startswith("End of training: train_avg_loss=")
    size = shown["sizes"]["total"]
    assert verb("delete", "0001-cat", "--yes")["freed_bytes"] == size
    assert main(["runs", "list", "--dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["RUN", "STATE", "STEP"],
        ["0002-short", "done", "2/2"],
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("answer", "is_left"), [("y\n", False), ("n\n", True), ("", True)])
def test_delete_asks_once_and_says_what_it_frees(
    answer: str,
    is_left: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = RunList(tmp_path).new(settings())
    monkeypatch.setattr("sys.stdin", Terminal(answer))
    assert main(["runs", "delete", "0001", "--dir", str(tmp_path)]) == 0
    assert capsys.readouterr().err == "Delete 0001? This frees 0.0 MiB. [y/N] "
    assert run.exists == is_left


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["show", "0009"], "There is no run '0009' in "),
        (["stop", "../0001"], "There is no run '../0001' in "),
        (["delete", "0001"], "Delete 0001 needs --yes where nobody can be asked."),
        (["start", "--max_steps=2"], "--train is missing: "),
        (["again", "0001", "--max_steps=many"], "max_steps must be a whole number"),
        (["continue", "0001"], "The run 0001 has not begun: it is waiting."),
    ],
)
def test_what_cannot_be_done_costs_one_sentence(
    argv: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = RunList(tmp_path).new(settings())
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert main(["runs", "--dir", str(tmp_path), *argv]) == 1
    assert capsys.readouterr().err.startswith(f"error: {sentence}")
    assert [one.state() for one in RunList(tmp_path).runs()] == [RunState.WAITING]
    assert run.settings() == settings()


def test_a_terminals_codes_in_names_and_logs_are_shown_as_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path / "a\x1b[2Jb\n\udcff")
    run.folder.mkdir()
    run.write_settings(settings())
    (run.folder / "log.txt").write_text("\x1b[2Jforged\n")
    assert main(["runs", "--dir", str(tmp_path), "list"]) == 0
    assert main(["runs", "--dir", str(tmp_path), "show", run.name]) == 0
    assert main(["runs", "--dir", str(tmp_path), "stop", run.name]) == 0
    assert main(["runs", "--dir", str(tmp_path), "delete", "--yes", run.name, run.name]) == 0
    assert main(["runs", "--dir", str(tmp_path / run.name), "list"]) == 0
    shown = capsys.readouterr().out
    shown.encode()
    assert "\x1b" not in shown
    assert "  | \\x1b[2Jforged" in shown
