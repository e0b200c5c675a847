"""`--run_dir`: one folder that tells all about a job, whoever starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dreambooth.job import run
from dreambooth.job.run import run_job
from dreambooth.runs.run_folder import Run, RunState
from dreambooth.settings import container
from dreambooth.tiny import DATA
from tests.runs.processes import kill, settings, trainers, wait_until
from tests.runs.stand_in.sitecustomize import work

CAT = ["--train", str(DATA / "cat"), "--pretrained-model", "tiny"]


@pytest.fixture
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what needs torch."""
    monkeypatch.setattr(run, "_work", work)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("only root may mount")
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_real_job_leaves_all_in_its_folder(
    small_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, root = Run(tmp_path / "mine"), tmp_path / "root"
    options = ["--max_steps=2", "--sample_steps=1", "--keep_last_checkpoint"]
    model = ["--pretrained-model", str(small_model_folder)]
    argv = [*CAT[:2], *model, *options, "--run_dir", str(mine.folder)]
    assert run_job(argv, {"SAGEMAKER_BASE_DIR": str(root)}) == 0
    assert mine.state() == RunState.DONE
    assert {path.name for path in mine.folder.iterdir()} - {"tensorboard"} == {
        *("settings.json", "process.json", "plan.json", "lock", "exit_code", "log.txt"),
        *("metrics.jsonl", "report.html", "samples", "checkpoints", "model"),
    }
    assert (mine.planned_steps(), mine.last_metrics()["step"]) == (2, 2)
    assert (mine.has_model(), mine.checkpoint_step()) == (True, 2)
    assert [path.name for path in mine.samples()] == ["step-000001.png", "step-000002.png"]
    assert mine.settings() == {
        "train": str(DATA / "cat"),
        "pretrained_model": str(small_model_folder),
        "max_steps": "2",
        "sample_steps": "1",
        "keep_last_checkpoint": True,
    }
    shown, log = capsys.readouterr(), (mine.folder / "log.txt").read_text()
    assert not root.exists()
    for line in (*shown.out.splitlines(), *shown.err.splitlines()):
        assert line in log


@pytest.mark.usefixtures("_stand_in")
def test_the_folder_alone_says_how_the_job_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = Run(tmp_path / "mine")
    monkeypatch.chdir(DATA)
    assert (
        run_job(["--run_dir", str(mine.folder), "--train=cat", *CAT[2:], "--max_steps=3"], {}) == 0
    )
    monkeypatch.chdir("/")
    assert run_job(["--run_dir", str(mine.folder), "--seed", "7"], {}) == 0
    assert mine.settings() == {**settings(), "max_steps": "3", "seed": "7"}
    before = mine.begun_at()
    assert run_job(["--run_dir", str(mine.folder), "--dry-run", "--max_steps=9"], {}) == 0
    assert "steps            9" in capsys.readouterr().out
    assert (mine.begun_at(), mine.settings()["max_steps"]) == (before, "3")


@pytest.mark.usefixtures("_stand_in")
def test_wrong_settings_are_kept_with_the_failure(tmp_path: Path) -> None:
    mine, root = Run(tmp_path / "mine"), tmp_path / "root"
    root.mkdir()
    argv = ["--run_dir", str(mine.folder), *CAT, "--max_steps=many", "--seed=-1"]
    assert run_job(argv, {"SAGEMAKER_BASE_DIR": str(root)}) == 1
    assert mine.state() == RunState.FAILED
    assert mine.failure() == (root / "output" / "failure").read_text()
    assert "max_steps" in mine.failure()
    assert "seed" in mine.failure()
    assert mine.settings()["max_steps"] == "many"
    assert f"error: {mine.failure()}" in mine.log_tail(1)


@pytest.mark.usefixtures("_stand_in")
def test_a_bug_of_ours_is_a_failure_with_its_trace_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_work", None)
    assert run_job(["--run_dir", str(tmp_path), *CAT], {}) == 1
    assert Run(tmp_path).state() == RunState.FAILED
    assert Run(tmp_path).failure().startswith("InternalError: TypeError")
    assert "Traceback" in "\n".join(Run(tmp_path).log_tail())


@pytest.mark.usefixtures("_stand_in")
def test_a_full_disk_is_a_failure_that_is_told(disk: Path) -> None:
    mine = Run(disk / "mine")
    assert run_job(["--run_dir", str(mine.folder), *CAT, "--max_steps=1"], {}) == 0
    free = os.statvfs(disk)
    (disk / "big").write_bytes(b"x" * (free.f_bavail * free.f_frsize - 16 * 1024))
    mine.folder.joinpath("metrics.jsonl").unlink()
    with mine.changing(), (mine.folder / "settings.json").open("a"):
        pass
    code = run_job(["--run_dir", str(mine.folder), "--max_steps=400"], {})
    assert code == 1
    assert mine.state() == RunState.FAILED
    assert "the disk is full" in mine.failure()


@pytest.mark.usefixtures("_stand_in")
def test_a_disk_that_is_full_at_the_start_costs_one_sentence(
    disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    free = os.statvfs(disk)
    (disk / "big").write_bytes(b"x" * (free.f_bavail * free.f_frsize))
    assert run_job(["--run_dir", str(disk / "mine"), *CAT, "--max_steps=1"], {}) == 1
    shown = capsys.readouterr().err
    assert "error: The run cannot be written to" in shown
    assert "the disk is full" in shown
    assert "Traceback" not in shown
    assert Run(disk / "mine").state() == RunState.DIED


def test_neither_help_nor_a_dry_run_makes_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--run_dir", str(tmp_path / "mine"), *CAT]
    assert run_job([*argv, "--dry-run"], {}) == 0
    with pytest.raises(SystemExit):
        run_job([*argv, "--help"], {})
    assert "Plan" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_stand_in")
def test_other_folders_beside_the_runs_are_refused(tmp_path: Path) -> None:
    argv = ["--run_dir", str(tmp_path), *CAT, "--model_dir=x", "--checkpoint_dir=y"]
    assert run_job(argv, {}) == 1
    assert "--model_dir does not go with --run_dir" in Run(tmp_path).failure()
    assert "--checkpoint_dir does not go with --run_dir" in Run(tmp_path).failure()


def test_the_platforms_folders_give_way_to_the_runs(tmp_path: Path) -> None:
    (tmp_path / "input").mkdir()
    environ = {
        "SAGEMAKER_BASE_DIR": str(tmp_path),
        "SM_MODEL_DIR": "/opt/ml/model",
        "SM_OUTPUT_DATA_DIR": "/opt/ml/output/data",
        "SM_HP_RUN_DIR": str(tmp_path / "mine"),
    }
    mine = tmp_path / "mine"
    environment = container.read([], environ)
    assert environment.model_dir == mine / "model"
    assert (environment.output_data_dir, environment.checkpoint_dir) == (mine, mine / "checkpoints")
    assert environment.ways_in.elsewhere("model_dir") == "give another folder with --run_dir"
    assert container.run_dir([], environ) == (mine, True)


@pytest.mark.on_demand
def test_of_several_processes_the_parent_holds_the_run(tmp_path: Path) -> None:
    argv = [*CAT, "--max_steps=1000", "--processes=2", "--run_dir", str(tmp_path)]
    with subprocess.Popen([sys.executable, "-m", "dreambooth", "train", *argv]) as parent:
        try:
            wait_until(Run(tmp_path).last_metrics)
            assert len(trainers(tmp_path)) == 3
            assert "training: 0/1000" in (tmp_path / "log.txt").read_text()
            process = Run(tmp_path).process()
            assert process is not None
            assert process.pid == parent.pid
            parent.kill()
            parent.wait()
            wait_until(lambda: Run(tmp_path).state() == RunState.DIED, 2.0)
            wait_until(lambda: trainers(tmp_path) == [], 10.0)
        finally:
            kill(trainers(tmp_path))


def test_what_is_saved_is_json(tmp_path: Path) -> None:
    argv = [*CAT, "--deterministic", "--run_dir=x", "--log_level=debug", "--unknown=1"]
    environ = {"SM_HPS": '{"max_steps": 3, "sagemaker_program": "x"}', "SM_HP_SEED": "4"}
    saved = container.to_save(argv, environ, {"seed": "9", "epochs": "2"})
    assert json.loads(json.dumps(saved)) == {
        "train": str(DATA / "cat"),
        "pretrained_model": "tiny",
        "deterministic": True,
        "log_level": "debug",
        "unknown": "1",
        "max_steps": "3",
        "seed": "9",
        "epochs": "2",
    }
