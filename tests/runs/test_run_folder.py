"""The state of a run, from what lies in its folder and from its lock alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dreambooth.errors import ResourceError, UserError
from dreambooth.process.identity import ProcessIdentity
from dreambooth.runs import run_folder
from dreambooth.runs.record import LOCK_VARIABLE, Record
from dreambooth.runs.run_folder import Run, RunState
from dreambooth.runs.run_status import RunStatus
from tests.runs.processes import TRUE_WITHIN_S, wait_until

ROOT = Path(__file__).parents[2]


def folder_with(place: Path, *names: str, code: str | None = None) -> Run:
    for name in names:
        (place / name).write_text("{}")
    if code is not None:
        (place / "exit_code").write_text(code)
    return Run(place)


@pytest.mark.parametrize(
    ("names", "code", "state"),
    [
        (["settings.json"], None, RunState.WAITING),
        (["settings.json", "lock"], None, RunState.WAITING),
        (["draft.json"], None, RunState.DRAFT),
        (["draft.json", "settings.json"], None, RunState.WAITING),
        (["settings.json", "lock", "process.json"], None, RunState.DIED),
        (["lock"], None, RunState.DIED),
        (["settings.json", "lock", "process.json"], "0\n", RunState.DONE),
        (["settings.json", "lock", "process.json", "failure"], None, RunState.FAILED),
        (["settings.json", "lock", "process.json"], "143\n", RunState.STOPPED),
        (["settings.json", "lock", "process.json"], "130\n", RunState.STOPPED),
        (["settings.json", "lock", "process.json"], "129\n", RunState.STOPPED),
        (["settings.json", "lock", "process.json"], "137\n", RunState.STOPPED),
        (["settings.json"], "143\n", RunState.STOPPED),  # taken off the list before it began
        (["settings.json", "lock", "process.json"], "1\n", RunState.FAILED),
        (["settings.json", "lock", "process.json"], "", RunState.DIED),
    ],
)
def test_the_table_of_states(
    tmp_path: Path, names: list[str], code: str | None, state: RunState
) -> None:
    assert folder_with(tmp_path, *names, code=code).state() == state


def test_the_table_in_the_documents_has_these_states_in_this_order() -> None:
    text = (ROOT / "docs" / "training.md").read_text("utf-8")
    table = text.partition("| state | what is there |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == list(RunState)
    assert re.findall(r"^    (\w+)  ", run_folder.__doc__ or "", re.MULTILINE) == list(RunState)


def test_an_empty_folder_is_no_run(tmp_path: Path) -> None:
    assert not Run(tmp_path).exists
    with pytest.raises(UserError, match="is no folder of a run"):
        Run(tmp_path).state()


def begun(folder: Path, **environ: str) -> Record:
    record = Record(folder, environ)
    record.begin()
    return record


def test_a_record_is_running_until_it_is_closed_and_then_what_it_says(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    record = begun(run.folder)
    record.settings({"train": "somewhere", "max_steps": "2"})
    assert run.state() == RunState.RUNNING
    assert run.process() == ProcessIdentity.of(os.getpid())
    record.ended(0)
    assert run.state() == RunState.RUNNING
    record.ended(143)  # the first word counts
    record.close()
    assert run.state() == RunState.DONE
    again = begun(run.folder)
    assert not (run.folder / "exit_code").exists()
    again.failed(UserError("The pictures are too small."))
    again.ended(1)
    again.close()
    assert run.state() == RunState.FAILED
    assert run.failure() == "The pictures are too small."
    assert not (run.folder / "exit_code").exists()
    third = begun(run.folder)
    third.close()
    assert run.state() == RunState.DIED


def test_a_second_trainer_is_refused_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = begun(tmp_path)
    record.ended(0)
    second = Record(tmp_path, {})
    with pytest.raises(UserError, match="Another process trains the run"):
        second.begin()
    second.failed(UserError("not mine"))
    second.ended(1)
    print("not mine")
    record.close()
    assert Run(tmp_path).state() == RunState.DONE
    assert "not mine" in (tmp_path / "log.txt").read_text()  # the first one's stream is this one


def test_without_a_folder_nothing_is_recorded(tmp_path: Path) -> None:
    record = Record(None, {})
    record.begin()
    record.settings({})
    record.plan(1, [])
    record.failed(UserError("x"))
    record.close()
    assert list(tmp_path.iterdir()) == []


def test_a_trainers_children_do_not_hold_its_lock(tmp_path: Path) -> None:
    code = (
        "import os, subprocess, sys\n"
        "from pathlib import Path\n"
        "from dreambooth.runs.record import Record\n"
        "Record(Path(sys.argv[1]), os.environ).begin()\n"
        "child = subprocess.Popen(['sleep', '60'], close_fds=False, stdout=2)\n"
        "print(child.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    run = Run(tmp_path)
    lock = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)  # as the runner hands it on
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, LOCK_VARIABLE: str(lock)},
        pass_fds=[lock],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    )
    os.close(lock)
    child = int(done.stdout)
    try:
        os.kill(child, 0)
        wait_until(lambda: run.state() == RunState.DIED, TRUE_WITHIN_S)
    finally:
        os.kill(child, 9)


def test_an_inherited_number_that_is_another_file_is_not_taken_for_the_lock(tmp_path: Path) -> None:
    with (tmp_path / "other").open("w") as other:
        record = begun(tmp_path, **{LOCK_VARIABLE: str(other.fileno())})
        assert Run(tmp_path).state() == RunState.RUNNING
        record.close()
        other.write("still open")


def test_a_copied_folder_is_not_running(tmp_path: Path) -> None:
    record = begun(tmp_path / "run")
    record.settings({"train": "somewhere"})
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert Run(tmp_path / "run").state() == RunState.RUNNING
    assert Run(tmp_path / "copy").state() == RunState.DIED
    record.close()


def test_a_clock_that_jumps_changes_no_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = begun(tmp_path)
    for seconds in (0.0, 4e9):
        monkeypatch.setattr(time, "time", lambda seconds=seconds: seconds)
        for name in ("process.json", "lock"):
            os.utime(tmp_path / name, (seconds, seconds))
        assert RunStatus.of(Run(tmp_path)).state == RunState.RUNNING
    record.ended(143)
    record.close()
    os.utime(tmp_path / "exit_code", (4e9, 4e9))
    assert RunStatus.of(Run(tmp_path)).state == RunState.STOPPED


def test_many_lookers_disturb_no_trainer_and_see_only_what_is_true(tmp_path: Path) -> None:
    run = folder_with(tmp_path, "settings.json")
    seen: list[RunState] = []
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            seen.append(run.state())
            time.sleep(0.0005)

    lookers = [threading.Thread(target=look) for _ in range(2)]
    for looker in lookers:
        looker.start()
    for _ in range(10):
        record = begun(tmp_path)
        record.ended(143)
        record.close()
        with run.changing() as state:
            assert state == RunState.STOPPED
    stop.set()
    for looker in lookers:
        looker.join()
    assert set(seen) <= {RunState.WAITING, RunState.RUNNING, RunState.STOPPED}


def test_a_trainer_cannot_begin_while_a_run_is_changed(tmp_path: Path) -> None:
    run = folder_with(tmp_path, "settings.json")
    with run.changing() as state:
        assert state == RunState.WAITING == run.state()
        with pytest.raises(UserError, match="Another process trains"):
            begun(tmp_path)
        with pytest.raises(UserError, match="is running"), run.changing():
            pass
    begun(tmp_path).close()


def test_a_full_disk_in_the_end_does_not_cost_the_last_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = begun(tmp_path)
    room = (tmp_path / ".last-word").stat()
    assert room.st_size == 4096 == room.st_blocks * 512
    record.failed(ResourceError("x" * 2000))
    record.close()
    assert (tmp_path / "failure").stat().st_ino == room.st_ino  # nothing new was allocated
    assert Run(tmp_path).failure().startswith("xxx")


def test_settings_mean_the_same_in_every_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "base").mkdir()
    run = Run(tmp_path / "run")
    run.folder.mkdir()
    monkeypatch.chdir(tmp_path)
    given = {"train": "photos", "pretrained_model": "base", "base": "owner/name", "epochs": 2}
    run.write_settings(given)
    monkeypatch.chdir("/")
    assert run.settings() == {
        **given,
        "train": str(tmp_path / "photos"),
        "pretrained_model": str(tmp_path / "base"),
    }
    for train in (f"file://{tmp_path}/photos", f'"{tmp_path}/photos"'):
        run.write_settings({"train": train})
        assert run.settings() == {"train": str(tmp_path / "photos")}
    for train in ("s3://bucket/photos", "file://", "", "a\0b", 7):
        run.write_settings({"train": train})
        assert json.loads((run.folder / "settings.json").read_text()) == {"train": train}
    run.write_settings({"train": str(run.folder / "pictures"), "pretrained_model": "tiny"})
    assert json.loads((run.folder / "settings.json").read_text())["train"] == "pictures"
    moved = Run(run.folder.rename(tmp_path / "moved"))
    assert moved.settings() == {
        "train": str(moved.folder / "pictures"),
        "pretrained_model": "tiny",
    }


def test_what_lies_there_is_read_and_what_is_damaged_is_left_out(tmp_path: Path) -> None:
    run = folder_with(tmp_path, "settings.json", "process.json", "plan.json")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    (tmp_path / "log.txt").write_bytes(b"one\ntwo\xff\n")
    for name in ("step-2", "step-10", "step-x", ".partial-step-20"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "manifest.json").write_text("1234")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text("123")
    status = RunStatus.of(run)
    assert (status.step, status.loss, status.steps) == (1, 0.5, None)
    assert (status.has_model, status.checkpoint_step) == (True, 10)
    assert (status.sizes.model, status.sizes.checkpoints) == (3, 16)
    assert run.log_tail(1) == ["two\ufffd"]
    assert json.dumps(status.as_json())
    for damaged in ("[]", "nonsense", '{"pid": -1}', '{"pid": true}', '{"pid": 1e3}'):
        (tmp_path / "process.json").write_text(damaged)
        (tmp_path / "plan.json").write_text(damaged)
        assert run.process() is None
        assert run.plan() == []


def test_no_number_in_a_file_is_too_strange_for_json(tmp_path: Path) -> None:
    huge = "9" * 4000
    run = folder_with(tmp_path, "lock")
    for number in ("NaN", "-Infinity", "1e999", huge):
        row = f'{{"step": 3, "loss": {number}, "steps_per_second": {number}}}\n'
        (tmp_path / "metrics.jsonl").write_text(row)
        (tmp_path / "process.json").write_text(f'{{"pid": 1, "begun_at": {number}}}')
        (tmp_path / "plan.json").write_text(f'{{"steps": {number}, "rows": {number}}}')
        (tmp_path / "settings.json").write_text(f'{{"learning_rate": {number}, "seed": {2**63}}}')
        found = {**RunStatus.of(run).as_json(), "settings": run.settings(), "plan": run.plan()}
        assert json.loads(json.dumps(found, allow_nan=False))["step"] == 3
        assert (found["loss"], found["begun_at"], found["steps"]) == (None, None, None)
        assert found["settings"] == {"learning_rate": number, "seed": 2**63}  # still wrong


def test_a_pipe_in_place_of_a_file_keeps_nobody_waiting(tmp_path: Path) -> None:
    run = folder_with(tmp_path, "settings.json")
    for name in ("failure", "log.txt", "metrics.jsonl", "plan.json", "exit_code", "process.json"):
        os.mkfifo(tmp_path / name)
    assert RunStatus.of(run).state == RunState.WAITING
    assert (run.log_tail(), run.plan()) == ([], [])
