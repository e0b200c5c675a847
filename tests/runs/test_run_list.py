from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from dreambooth.errors import HyperparameterError, ResourceError, UserError
from dreambooth.process import files
from dreambooth.runs import run_list
from dreambooth.runs.record import Record
from dreambooth.runs.run_folder import Run, RunState
from dreambooth.runs.run_list import RunList
from dreambooth.tiny import DATA
from tests.runs.processes import settings


def ended(run: Run, code: int = 143) -> None:
    record = Record(run.folder, {})
    record.begin()
    record.ended(code)
    record.close()


def test_runs_are_numbered_named_and_sorted(tmp_path: Path) -> None:
    runs = RunList(tmp_path / "runs")
    assert runs.runs() == []
    runs.new(settings(), name="cat")
    runs.new_draft({"steps": "not yet"})
    (runs.folder / "10000").mkdir()
    (runs.folder / "no-run").mkdir()
    (runs.folder / "a-file").write_text("")
    runs.new(settings(), name="dog")
    names = [run.name for run in runs.runs()]
    assert names == ["0001-cat", "0002", "10001-dog"]
    assert [run.state() for run in runs.runs()] == [
        RunState.WAITING,
        RunState.DRAFT,
        RunState.WAITING,
    ]
    assert runs.run("0002").draft() == {"steps": "not yet"}
    assert runs.new(settings(), name="n" * 80).name == "10002-" + "n" * 80


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", ".deleted-1", "x" * 90, "a\nb"])
def test_names_are_names_and_never_paths(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="There is no run"):
        RunList(tmp_path).run(name)
    if name:
        with pytest.raises(UserError, match="cannot be named"):
            RunList(tmp_path).new(settings(), name=name)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_was_made_by_hand_may_have_any_name(tmp_path: Path) -> None:
    ended(Run(tmp_path / "my best cat"))
    assert RunList(tmp_path).run("my best cat").state() == RunState.STOPPED


def test_wrong_settings_are_all_named_and_make_no_run(tmp_path: Path) -> None:
    wrong = {"max_steps": "-1", "model_dir": "x", "learning_rate": "fast"}
    with pytest.raises(HyperparameterError) as caught:
        RunList(tmp_path).new(wrong)
    faults = " ".join(caught.value.faults)
    for name in ("--train", "max_steps", "model_dir", "learning_rate"):
        assert name in faults
    assert list(tmp_path.iterdir()) == []


def test_a_draft_keeps_its_contents_until_it_is_sent_off(tmp_path: Path) -> None:
    run = RunList(tmp_path).new_draft({"max_steps": "many"})
    with pytest.raises(HyperparameterError):
        run_list.submit(run, {"max_steps": "many"})
    assert (run.state(), run.draft()) == (RunState.DRAFT, {"max_steps": "many"})
    run.save_draft({"max_steps": "2"})
    assert run.state() == RunState.DRAFT
    run_list.submit(run, settings(2))
    assert (run.state(), run.settings()["max_steps"]) == (RunState.WAITING, 2)
    with pytest.raises(UserError, match="is waiting, and no draft"):
        run_list.submit(run, settings(2))


def test_again_copies_settings_with_changes_and_pictures_of_the_run(tmp_path: Path) -> None:
    runs = RunList(tmp_path)
    old = runs.new_draft({}, name="cat")
    shutil.copytree(DATA / "cat", old.folder / "pictures")
    run_list.submit(old, settings() | {"train": str(old.folder / "pictures"), "seed": 3})
    new = runs.again(old, {"max_steps": 5, "seed": ""})
    runs.delete(old)
    assert new.name == "0002-cat"
    assert new.settings() == {
        **settings(5),
        "train": str(new.folder / "pictures"),
        "seed": "",
    }
    assert len(list((new.folder / "pictures").iterdir())) > 4
    with pytest.raises(HyperparameterError):
        runs.again(new, {"max_steps": "many"})
    new.write_settings(settings() | {"seeds": 3})  # a trainer only warns of unknown names
    assert runs.again(new, {}).settings() == settings()
    runs.delete(runs.runs()[-1])
    assert len(runs.runs()) == 1


def test_a_run_that_has_ended_goes_on_with_its_checkpoint(tmp_path: Path) -> None:
    runs = RunList(tmp_path)
    run = runs.new(settings() | {"resume": "fresh"})
    with pytest.raises(UserError, match="has not begun"):
        run_list.go_on(run, {})
    ended(run)
    run_list.go_on(run, {"max_steps": "30"})
    assert run.state() == RunState.WAITING
    assert run.settings() == settings() | {"max_steps": "30"}  # it does not begin afresh again
    ended(run, 0)
    with pytest.raises(UserError, match="is done: to train it further, give it more steps"):
        run_list.go_on(run, {})
    assert run.state() == RunState.DONE


def test_a_running_run_is_neither_deleted_nor_changed(tmp_path: Path) -> None:
    runs = RunList(tmp_path)
    run = runs.new(settings())
    record = Record(run.folder, {})
    record.begin()
    for change in (lambda: runs.delete(run), lambda: run_list.go_on(run, {"seed": 1})):
        with pytest.raises(UserError, match="is running: stop it first"):
            change()
    assert run.settings() == settings()
    record.close()
    freed = sum(path.stat().st_size for path in run.folder.rglob("*"))
    assert runs.delete(run) == freed
    assert runs.runs() == []


def test_what_an_interrupted_deletion_leaves_is_no_run_and_goes_next_time(tmp_path: Path) -> None:
    runs = RunList(tmp_path)
    left = tmp_path / ".deleted-0001-1"
    left.mkdir()
    (left / "settings.json").write_text("{}")
    assert runs.runs() == []
    runs.delete(runs.new(settings()))
    assert not left.exists()


def test_a_run_that_cannot_be_looked_at_hides_no_other(
    unprivileged_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runs = RunList(unprivileged_folder)
    run, closed = runs.new(settings()), runs.new(settings())
    (closed.folder / "lock").write_text("")
    (closed.folder / "lock").chmod(0)
    assert [status.name for status in runs.statuses()] == [run.name]
    assert f"{closed.folder} cannot be locked" in caplog.text


def test_a_closed_folder_hides_no_run_and_a_closed_list_is_not_called_empty(
    unprivileged_folder: Path,
) -> None:
    runs = RunList(unprivileged_folder / "runs")
    run, closed = runs.new(settings()), runs.new(settings())
    (run.folder / "model").mkdir(mode=0)
    closed.folder.chmod(0)
    assert [status.name for status in runs.statuses()] == [run.name]
    runs.folder.chmod(0)
    with pytest.raises(UserError, match=r"cannot be listed \(Permission denied\): give another"):
        runs.runs()
    for folder in (runs.folder, closed.folder, run.folder / "model"):
        folder.chmod(0o777)


def test_a_run_whose_name_is_as_long_as_can_be_is_deleted(tmp_path: Path) -> None:
    run = Run(tmp_path / ("n" * 255))
    ended(run)
    RunList(tmp_path).delete(run)
    assert list(tmp_path.iterdir()) == []


def test_a_deletion_takes_nothing_that_is_mounted_or_linked_in_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = RunList(tmp_path / "my runs")
    run, left = runs.new(settings()), runs.folder / ".deleted-1"
    (left / "disk").mkdir(parents=True)
    photos = tmp_path / "photos"
    photos.mkdir()
    (run.folder / "photos").symlink_to(photos)
    text = str(runs.folder).replace(" ", "\\040")
    mounts = tmp_path / "mountinfo"  # as in proc_pid_mountinfo(5)
    mounts.write_text(
        f"1 0 8:1 / / rw - ext4 /dev/x rw\n2 1 8:1 /a {text}/0001/disk rw - ext4 /dev/x rw\n"
        f"3 1 8:1 /a {text}/.deleted-1/disk rw - ext4 /dev/x rw\n"
    )
    monkeypatch.setattr(files, "_MOUNTS", mounts)
    with pytest.raises(UserError, match=r"mounted.*: unmount .*/my runs/0001/disk first"):
        runs.delete(run)
    mounts.write_text(mounts.read_text().replace("/0001/", "/0002/"))
    runs.delete(run)
    assert [path.name for path in runs.folder.iterdir()] == [".deleted-1"]
    assert photos.is_dir()


def test_a_link_to_a_run_is_not_deleted_in_place_of_it(tmp_path: Path) -> None:
    runs = RunList(tmp_path / "runs")
    ended(Run(tmp_path / "elsewhere"))
    runs.folder.mkdir()
    (runs.folder / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"is a link to .*/elsewhere: delete that folder"):
        runs.delete(runs.run("link"))
    assert runs.run("link").state() == RunState.STOPPED


def test_of_a_run_that_the_disk_does_not_take_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = RunList(tmp_path)
    old = runs.new_draft({})
    shutil.copytree(DATA / "cat", old.folder / "pictures")
    run_list.submit(old, settings() | {"train": str(old.folder / "pictures")})

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "fsync", full)
    for add in (lambda: runs.new(settings()), lambda: runs.again(old, {})):
        with pytest.raises(ResourceError, match="the disk is full"):
            add()
    with pytest.raises(ResourceError, match="the disk is full"):
        runs.new_draft({})
    assert list(tmp_path.iterdir()) == [old.folder]
