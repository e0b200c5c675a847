from __future__ import annotations

import contextlib
import errno
import json
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from dreambooth.errors import HyperparameterError, ResourceError, UserError
from dreambooth.job import outputs
from dreambooth.job.run import run_job
from dreambooth.process import files, temporary_folder
from dreambooth.settings import container
from dreambooth.settings.hyperparameters import Hyperparameters
from dreambooth.tiny import DATA


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    made = {name: tmp_path / name for name in ("train", "model_dir", "output", "base")}
    made["train"].mkdir()
    made["base"].mkdir()
    return made


def read(places: Mapping[str, Path], **changes: Path) -> container.Environment:
    chosen = {**places, **changes}
    argv = [f"--train={chosen['train']}", f"--model_dir={chosen['model_dir']}"]
    argv.append(f"--output_data_dir={chosen['output']}")
    if "checkpoint_dir" in chosen:
        argv.append(f"--checkpoint_dir={chosen['checkpoint_dir']}")
    return container.read(argv, {})


def test_separate_folders_are_fine(places: dict[str, Path]) -> None:
    outputs.check(read(places), places["base"])
    outputs.check(read(places, checkpoint_dir=places["output"]), None)


@pytest.mark.parametrize(
    ("option", "inside"),
    [
        ("model_dir", "train"),
        ("output", "train"),
        ("checkpoint_dir", "train"),
        ("model_dir", "base"),
        ("output", "base"),
        ("output", "model_dir"),
        ("checkpoint_dir", "model_dir"),
    ],
)
@pytest.mark.parametrize("below", ["", "below/it"])
def test_outputs_never_lie_in_what_is_read_or_in_the_model(
    places: dict[str, Path], option: str, inside: str, below: str
) -> None:
    with pytest.raises(HyperparameterError, match="choose another folder"):
        outputs.check(read(places, **{option: places[inside] / below}), places["base"])


def test_a_symlink_does_not_hide_it(places: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(places["train"])
    with pytest.raises(HyperparameterError, match="training folder"):
        outputs.check(read(places, model_dir=tmp_path / "link" / "out"), None)


def test_a_size_is_counted_while_others_write_and_remove(tmp_path: Path) -> None:
    """SageMaker's agent writes and removes files in the folders that it uploads."""
    (tmp_path / "ours").write_bytes(b"12345")
    ended = threading.Event()

    def others() -> None:
        while not ended.is_set():
            (tmp_path / "folder").mkdir()
            (tmp_path / "folder" / "marker").touch()
            (tmp_path / "folder" / "marker").unlink()
            (tmp_path / "folder").rmdir()

    thread = threading.Thread(target=others)
    thread.start()
    try:
        sizes = {outputs.size([tmp_path]) for _ in range(2000)}
    finally:
        ended.set()
        thread.join()
    assert sizes == {5}


@pytest.mark.parametrize("option", ["output", "checkpoint_dir"])
def test_what_cannot_be_written_is_found_at_once(
    places: dict[str, Path], tmp_path: Path, option: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResourceError, match=r"give another folder with --\w+_dir"):
        outputs.make(read(places, **{option: tmp_path / "file"}))


def test_the_job_refuses_before_anything_is_touched(
    places: dict[str, Path], small_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    train = places["train"]
    Image.new("RGB", (32, 32)).save(train / "1.png")
    (train / "dataset_info.json").write_text(json.dumps({"instance_prompt": "a photo of x"}))
    before = sorted(train.rglob("*"))
    argv = [f"--train={train}", f"--pretrained-model={small_model_folder}"]
    assert run_job([*argv, f"--model_dir={train}", "--dry-run"], {}) == 1
    assert run_job([*argv, f"--model_dir={train / 'out'}"], {}) == 1
    assert "lies in the training folder" in capsys.readouterr().err
    assert sorted(train.rglob("*")) == before


OPTIONS = ("model_dir", "output", "checkpoint_dir")
SETTINGS = Hyperparameters()


def places_of(tmp_path: Path, seed: int) -> tuple[container.Environment, container.Environment]:
    """Return two jobs that share one folder, spelled in different ways, under any two options."""
    dice = random.Random(seed)
    mine, theirs = dice.choice(OPTIONS), dice.choice(OPTIONS)
    shared = tmp_path / "shared"
    made = {name: tmp_path / f"mine-{name}" for name in OPTIONS} | {mine: shared}
    other = {name: tmp_path / f"theirs-{name}" for name in OPTIONS}
    spelling = dice.randrange(4)
    (tmp_path / "link").symlink_to(shared if spelling == 1 else tmp_path)
    spellings = (shared, tmp_path / "link", tmp_path / "link" / "shared")
    other[theirs] = (*spellings, tmp_path / "link" / ".." / tmp_path.name / "shared")[spelling]
    if dice.random() < 0.5:
        shared.mkdir()
    train = {"train": tmp_path / "train"}
    return read(train, **made), read(train, **other)


@pytest.mark.parametrize("seed", range(16))
def test_a_second_job_in_a_folder_is_refused_until_the_first_ends(
    tmp_path: Path, seed: int
) -> None:
    first, second = places_of(tmp_path, seed)
    with outputs.locked(first, SETTINGS):
        before = sorted(tmp_path.rglob("*"))
        said = r"^Another job is writing to .*(shared|link).*: wait until it ends, or give another"
        with pytest.raises(UserError, match=said), outputs.locked(second, SETTINGS):
            pass
        assert sorted(tmp_path.rglob("*")) == before
    with outputs.locked(second, SETTINGS):
        pass


def test_in_a_container_there_is_no_other_folder_to_name(tmp_path: Path) -> None:
    (tmp_path / "input" / "config").mkdir(parents=True)
    environment = container.read([], {"SAGEMAKER_BASE_DIR": str(tmp_path)})
    with outputs.locked(environment, SETTINGS), pytest.raises(UserError) as caught:
        outputs.locked(environment, SETTINGS).__enter__()
    assert str(caught.value).endswith(": wait until it ends.")


@pytest.fixture
def root(tmp_path: Path, small_model_folder: Path) -> Path:
    """Return a container's /opt/ml that a job can run in."""
    data = tmp_path / "ml" / "input" / "data"
    (tmp_path / "ml" / "output").mkdir(parents=True)
    shutil.copytree(DATA / "cat", data / "training")
    data.joinpath("model").symlink_to(small_model_folder)
    return tmp_path / "ml"


FAULTS: list[tuple[list[str], dict[str, str], str]] = [
    ([], {}, "Another job is writing to"),
    (["--model_dir=elsewhere"], {}, "Another job is writing to"),
    ([], {"SM_HP_MAX_STEPS": "many"}, "max_steps must be"),
    (["--dry-run"], {"SM_HP_MAX_STEPS": "0"}, "max_steps must be"),
    (["--dry-run", "--train=/none"], {}, "/none"),
    (["stray"], {}, "stray"),
    ([], {"WORLD_SIZE": "abc"}, "WORLD_SIZE"),
    ([], {"RANK": "abc"}, "RANK"),
    ([], {"WORLD_SIZE": "2", "RANK": "0"}, "LOCAL_RANK is not set"),
]


@pytest.mark.parametrize(("argv", "variables", "words"), FAULTS)
def test_a_second_job_leaves_no_failure_where_the_first_one_runs(
    root: Path,
    argv: list[str],
    variables: dict[str, str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What it wrote there would be read as the failure of the first one."""
    monkeypatch.chdir(root.parent)
    environ = {"SAGEMAKER_BASE_DIR": str(root), **variables}
    first = container.read([], {"SAGEMAKER_BASE_DIR": str(root)})
    with outputs.locked(first, SETTINGS):
        before = sorted(root.rglob("*"))
        assert run_job(argv, environ) == 1
        assert sorted(root.rglob("*")) == before
    assert words in capsys.readouterr().err
    if "Another job" not in words:
        assert run_job(argv, environ) == 1
        assert words in (root / "output" / "failure").read_text()


def test_other_processes_of_the_job_tell_its_failure(root: Path) -> None:
    environ = {"SAGEMAKER_BASE_DIR": str(root), "WORLD_SIZE": "2"}
    with outputs.locked(container.read([], environ), SETTINGS):
        assert run_job([], {**environ, "RANK": "1"}) == 1
    assert "LOCAL_RANK is not set" in (root / "output" / "failure").read_text()


def test_a_job_with_a_root_of_its_own_tells_its_failure(root: Path, tmp_path: Path) -> None:
    """Two containers may share the model's folder alone; each has its own /opt/ml/output."""
    shutil.copytree(root, tmp_path / "other", symlinks=True)
    first = container.read([], {"SAGEMAKER_BASE_DIR": str(root)})
    with outputs.locked(first, SETTINGS):
        environ = {"SAGEMAKER_BASE_DIR": str(tmp_path / "other")}
        assert run_job([], {**environ, "SM_MODEL_DIR": str(first.model_dir)}) == 1
    assert not (root / "output" / "failure").exists()
    assert "Another job is writing" in (tmp_path / "other" / "output" / "failure").read_text()


def test_jobs_of_one_root_with_folders_of_their_own_run_side_by_side(
    root: Path, tmp_path: Path
) -> None:
    with contextlib.ExitStack() as running:
        for name in "ab":
            argv = [f"--model_dir={tmp_path / name}", f"--output_data_dir={tmp_path / name}-output"]
            environment = container.read(argv, {"SAGEMAKER_BASE_DIR": str(root)})
            running.enter_context(outputs.locked(environment, SETTINGS))
        assert files.is_locked(root / "output")
    assert not files.is_locked(root / "output")


def test_a_folder_of_checkpoints_beside_the_metrics_is_locked_too(tmp_path: Path) -> None:
    asks = Hyperparameters(checkpointing_steps=5)
    mine = {name: tmp_path / name for name in ("train", "model_dir", "output")}
    theirs = {**mine, "model_dir": tmp_path / "m", "output": tmp_path / "o"}
    kept = tmp_path / "output" / "checkpoints"
    with outputs.locked(read(mine), asks):
        with pytest.raises(UserError, match="checkpoints"):
            outputs.locked(read(theirs, checkpoint_dir=kept), SETTINGS).__enter__()
        (kept / "step-00000005").mkdir()
    assert kept.is_dir()
    assert not (tmp_path / "model_dir").exists()  # nothing was written there


def test_one_folder_for_two_options_and_folders_side_by_side_are_fine(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "output")
    for number in (1, 2):
        place = {name: tmp_path / f"{name}{number}" for name in ("train", "model_dir", "output")}
        environment = read(place, checkpoint_dir=place["output"])
        lock = outputs.locked(environment, SETTINGS)
        lock.__enter__()


def test_a_killed_job_holds_no_folder(tmp_path: Path) -> None:
    code = "import fcntl, os, time\nfcntl.flock(os.open('.', os.O_RDONLY), fcntl.LOCK_EX)\n"
    code += "print(flush=True); time.sleep(60)"
    place = {name: tmp_path for name in ("train", "model_dir", "output")}
    with subprocess.Popen(
        [sys.executable, "-S", "-c", code], cwd=tmp_path, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(UserError), outputs.locked(read(place), SETTINGS):
            pass
        process.kill()
        process.wait()
        with outputs.locked(read(place), SETTINGS):
            pass


@pytest.mark.parametrize("number", ["ENOLCK", "EOPNOTSUPP", "ENOSYS", "EBADF", "EINVAL", "EACCES"])
def test_a_file_system_without_locks_is_a_warning(
    places: dict[str, Path],
    number: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(getattr(errno, number), "no locks")

    monkeypatch.setattr("fcntl.flock", flock)
    with outputs.locked(read(places), SETTINGS), temporary_folder.temporary():
        pass
    assert len(caplog.records) == 2
    assert "cannot be locked (no locks): start no other job" in caplog.text


@pytest.mark.parametrize(
    ("variables", "refused"),
    [
        ({}, True),
        ({"RANK": "0", "WORLD_SIZE": "2"}, True),
        ({"RANK": "1", "WORLD_SIZE": "2"}, False),
        ({"SM_HOSTS": '["algo-1", "algo-2"]', "SM_CURRENT_HOST": "algo-1"}, True),
        ({"SM_HOSTS": '["algo-1", "algo-2"]', "SM_CURRENT_HOST": "algo-2"}, False),
        ({"SM_HOSTS": '["algo-1"]', "SM_CURRENT_HOST": "algo-1"}, True),
        ({"SM_HOSTS": "no list", "SM_CURRENT_HOST": "algo-2"}, True),
    ],
)
def test_only_the_main_process_of_the_first_host_locks(
    small_model_folder: Path,
    tmp_path: Path,
    variables: Mapping[str, str],
    refused: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """SDK v2's local mode mounts one /opt/ml/model in the containers of all hosts."""
    grouped = {"LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    environ = {"SAGEMAKER_BASE_DIR": str(tmp_path / "none"), **variables}
    if "WORLD_SIZE" in variables:
        environ |= grouped
    argv = [f"--train={DATA / 'cat'}", f"--model_dir={tmp_path / 'model'}"]
    argv.append(f"--pretrained-model={small_model_folder}")
    ended = UserError("it went on")

    def go_on(*_: object) -> None:
        raise ended

    monkeypatch.setattr("dreambooth.model_folder.source.open_source", go_on)
    monkeypatch.setattr("dreambooth.job.meeting.LONGEST_S", 0.0)  # there is no first host
    with outputs.locked(container.read(argv, {}), SETTINGS):
        assert run_job(argv, environ) == 1
    assert ("Another job is writing to" in capsys.readouterr().err) is refused


@pytest.mark.parametrize("current", ["algo-1", "algo-2"])
def test_the_hosts_of_a_container_are_in_its_file(tmp_path: Path, current: str) -> None:
    config = tmp_path / "input" / "config"
    config.mkdir(parents=True)
    hosts = {"current_host": current, "hosts": ["algo-1", "algo-2"]}
    (config / "resourceconfig.json").write_text(json.dumps(hosts))
    environment = container.read([], {"SAGEMAKER_BASE_DIR": str(tmp_path)})
    assert environment.hosts.is_first is (current == "algo-1")
