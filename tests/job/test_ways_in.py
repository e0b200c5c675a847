"""Messages speak the user's way in: options on a command line, channels in a container."""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from dreambooth.errors import DreamBoothError
from dreambooth.job import outputs
from dreambooth.job.run import run_job
from dreambooth.process import files
from dreambooth.settings import container
from dreambooth.tiny import DATA, WEIGHTS

SOME_CHANNELS = ("train", "Training", "TRAIN", "images", "data", "photos-1", "input", "cat.v2")
OUTPUTS = ("model_dir", "output_data_dir", "checkpoint_dir")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a container's /opt/ml whose two channels are sound."""
    data = tmp_path / "ml" / "input" / "data"
    (tmp_path / "ml" / "output").mkdir(parents=True)
    shutil.copytree(DATA / "cat", data / "training")
    data.joinpath("model").symlink_to(WEIGHTS)
    return tmp_path / "ml"


def failure_of(root: Path, capsys: pytest.CaptureFixture[str], *argv: str, **variables: str) -> str:
    """Return the one sentence with which a dry run ends."""
    assert run_job([*argv, "--dry-run"], {"SAGEMAKER_BASE_DIR": str(root), **variables}) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def speaks_of_options(text: str) -> bool:
    return re.search(r"(^|[\s(])--[a-z]", text) is not None


@pytest.mark.parametrize("seed", range(12))
def test_a_channel_under_another_name_is_named(
    root: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    dice = random.Random(seed)
    missing = dice.choice(("training", "model"))
    others = dice.sample(SOME_CHANNELS, dice.randint(1, 7))
    data = root / "input" / "data"
    first, *more = others
    (data / missing).rename(data / first)
    for name in more:
        (data / name).mkdir()
    said = failure_of(root, capsys)
    assert f"as the channel `{missing}` (this job has `{sorted(others)[0]}`" in said
    assert f"; the name must be `{missing}`)" in said
    for name in sorted(others)[:5]:
        assert f"`{name}`" in said
    assert not speaks_of_options(said)


@pytest.mark.parametrize("missing", ["training", "model"])
@pytest.mark.parametrize("epoch", ["0", "1"])
def test_a_channel_in_pipe_mode_is_a_sentence(
    root: Path, missing: str, epoch: str, capsys: pytest.CaptureFixture[str]
) -> None:
    channel = root / "input" / "data" / missing
    channel.rename(root / "aside")
    os.mkfifo(channel.with_name(f"{missing}_{epoch}"))
    said = failure_of(root, capsys)
    assert f"`{missing}` (it is a pipe, `{missing}_{epoch}`: choose the input mode File" in said


def no_training(root: Path) -> None:
    (root / "input/data/training").rename(root / "aside")


def a_file_for_training(root: Path) -> None:
    no_training(root)
    (root / "input/data/training").write_text("in the way")


def no_prompts(root: Path) -> None:
    (root / "input/data/training/dataset_info.json").unlink()


def no_pictures(root: Path) -> None:
    for path in (root / "input/data/training").glob("*.png"):
        path.unlink()


def no_model(root: Path) -> None:
    (root / "input/data/model").unlink()


def an_empty_model(root: Path) -> None:
    no_model(root)
    (root / "input/data/model").mkdir()


def a_strange_model(root: Path) -> None:
    an_empty_model(root)
    (root / "input/data/model/notes.txt").write_bytes(b"")


FAULTS = (no_training, a_file_for_training, no_prompts, no_pictures)
MODEL_FAULTS = (no_model, an_empty_model, a_strange_model)


@pytest.mark.parametrize("fault", [*FAULTS, *MODEL_FAULTS])
@pytest.mark.parametrize("way", ["container", "toolkit", "command line"])
def test_what_is_wrong_with_an_input_is_said_in_the_users_words(
    root: Path, fault: Callable[[Path], None], way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fault(root)
    argv, variables = [], {}
    training, model = root / "input/data/training", root / "input/data/model"
    if way == "toolkit":
        variables = {"SM_CHANNEL_TRAINING": str(training), "SM_CHANNEL_MODEL": str(model)}
    if way == "command line":
        argv = [f"--train={training}", f"--pretrained-model={model}"]
        argv.append(f"--model_dir={root / 'out'}")
        said = failure_of(root / "none", capsys, *argv)
        assert "channel" not in said
        option = "--pretrained-model" if fault in MODEL_FAULTS else "--train"
        assert option in said or fault in (no_prompts, no_pictures)
    else:
        said = failure_of(root, capsys, *argv, **variables)
        assert not speaks_of_options(said)
        assert "as the channel `" in said or fault in (no_prompts, no_pictures)


@pytest.mark.parametrize(
    ("argv", "variables", "words"),
    [
        ([], {}, "let the S3 path of the channel `training`, or the folder mounted there, end"),
        (["--train"], {}, "give that folder with --train?"),
        (["--train="], {}, "give that folder with --train?"),
        ([], {"SM_CHANNEL_TRAINING": ""}, "let the S3 path of the channel `training`"),
        ([], {"SM_HP_TRAIN": ""}, "give that folder with the hyperparameter train?"),
    ],
)
@pytest.mark.parametrize("name", ["photos", "training", "cat pictures", "data"])
def test_a_training_folder_in_a_folder_is_told_in_the_users_words(
    root: Path,
    argv: list[str],
    variables: dict[str, str],
    words: str,
    name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    training = root / "input/data/training"
    training.rename(root / "aside")
    training.mkdir()
    (root / "aside").rename(training / name)
    options = [f"{each.rstrip('=')}={training}" for each in argv]
    said = failure_of(root, capsys, *options, **dict.fromkeys(variables, str(training)))
    assert f"(there is one in its sub-folder {name}: {words}" in said
    assert speaks_of_options(said) is bool(argv)


def test_a_variable_under_another_name_is_named_in_script_mode(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variables = {"SM_CHANNEL_TRAIN": str(DATA / "cat"), "SM_MODEL_DIR": str(tmp_path / "model")}
    said = failure_of(tmp_path / "none", capsys, **variables)
    assert "as the channel `training` (this job has `train`; the name must be `training`)" in said


def test_what_was_given_as_an_option_or_a_setting_is_named_so_in_a_container_too(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "with --train." in failure_of(root, capsys, "--train=/none")
    said = failure_of(root, capsys, SM_HP_TRAIN="/none")
    assert said.endswith("and dataset_info.json with the hyperparameter train.")
    assert "with --pretrained-model" in failure_of(root, capsys, "--pretrained-model=/none")
    said = failure_of(root, capsys, SM_HP_PRETRAINED_MODEL="/none")
    assert "in the hyperparameter pretrained_model" in said


@pytest.mark.parametrize(
    ("argv", "variables", "name"),
    [
        (["--train=s3://b/c"], {}, "--train"),
        ([], {"SM_CHANNEL_TRAINING": "s3://b/c"}, "SM_CHANNEL_TRAINING"),
        ([], {"SM_CHANNEL_MODEL": "s3://b/c"}, "SM_CHANNEL_MODEL"),
        ([], {"SM_HP_TRAIN": "s3://b/c"}, "train"),
    ],
)
def test_an_address_is_named_by_what_gave_it(
    root: Path,
    argv: list[str],
    variables: dict[str, str],
    name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = failure_of(root, capsys, *argv, **variables)
    assert said.startswith(f"error: {name} is the address 's3://b/c'")


@pytest.mark.parametrize("option", OUTPUTS)
@pytest.mark.parametrize("way", ["platform", "SM_HP", "argument", "outside"])
def test_another_place_for_an_output_is_said_in_the_users_words(
    root: Path, tmp_path: Path, option: str, way: str
) -> None:
    argv, environ = [], {"SAGEMAKER_BASE_DIR": str(root)}
    if way == "argument":
        argv = [f"--{option}=/elsewhere"]
    if way == "SM_HP":
        environ[f"SM_HP_{option.upper()}"] = "/elsewhere"
    if way == "outside":
        environ["SAGEMAKER_BASE_DIR"] = str(tmp_path / "none")
    said = container.read(argv, environ).ways_in.elsewhere(option)
    assert said == {
        "platform": "mount another disk there or, on SageMaker, raise volume_size",
        "SM_HP": f"give another folder with the hyperparameter {option}",
    }.get(way, f"give another folder with --{option}")


@pytest.mark.parametrize("option", OUTPUTS)
def test_an_output_in_the_data_is_refused_in_the_users_words(root: Path, option: str) -> None:
    inside = str(root / "input/data/training/out")
    for argv, name in (([], option), ([f"--{option}={inside}"], f"--{option}")):
        variables = {f"SM_HP_{option.upper()}": inside} if not argv else {}
        environment = container.read(argv, {"SAGEMAKER_BASE_DIR": str(root), **variables})
        with pytest.raises(DreamBoothError, match=f"^{name} {inside} lies in the training"):
            outputs.check(environment, None)


@pytest.mark.parametrize("in_container", [True, False])
def test_every_file_of_a_job_knows_the_users_way_to_another_place(
    small_model_folder: Path,
    root: Path,
    tmp_path: Path,
    in_container: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whichever file a full disk hits, the advice is given in the user's words."""
    real, clauses = files.disk_faults_named, set()

    def noted(
        what: str, where: Path | str, *, elsewhere: str, smaller: str = ""
    ) -> AbstractContextManager[None]:
        if "temporary folder" not in what:
            clauses.add(elsewhere)
        return real(what, where, elsewhere=elsewhere, smaller=smaller)

    monkeypatch.setattr(files, "disk_faults_named", noted)
    argv = ["--max_steps=1", "--checkpointing_steps=1", "--with_prior_preservation"]
    argv += ["--num_class_images=1", f"--pretrained-model={small_model_folder}"]
    if in_container:
        (root / "checkpoints").mkdir()
        assert run_job(argv, {"SAGEMAKER_BASE_DIR": str(root)}) == 0
        assert clauses == {"mount another disk there or, on SageMaker, raise volume_size"}
        return
    argv += [f"--train={DATA / 'cat'}", f"--model_dir={tmp_path / 'm'}"]
    assert run_job(argv, {"SAGEMAKER_BASE_DIR": str(tmp_path / "none")}) == 0
    options = ("model_dir", "output_data_dir", "checkpoint_dir")
    assert clauses == {f"give another folder with --{option}" for option in options}
