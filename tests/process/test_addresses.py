from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreambooth import __main__ as cli
from dreambooth.errors import HyperparameterError, UserError
from dreambooth.job.run import run_job
from dreambooth.process import addresses
from dreambooth.settings import container

REMOTE = [
    "s3://bucket/key",
    "S3://bucket",
    "https://a.org/x",
    "gs://b/c",
    "hf://o/n",
    "a+b.c-d://x",
    "s3:/bucket",  # pathlib writes addresses like this
    "  s3://bucket",
]


@pytest.mark.parametrize("text", REMOTE)
def test_an_address_is_no_path(text: str) -> None:
    assert addresses.is_remote(text)
    with pytest.raises(UserError, match=r"--out is the address .* paths of this machine"):
        addresses.to_path(text, "--out")


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("file:///opt/ml/model", "/opt/ml/model"),
        ("FILE:///opt/ml/model", "/opt/ml/model"),
        ("file://localhost/opt/ml", "/opt/ml"),
        ("file://./model", "model"),
        ("file://pictures/cat", "pictures/cat"),
        ("file:///a%20b/%E7%8C%AB#1?x", "/a b/猫#1?x"),
        ("~/model", os.path.expanduser("~/model")),
        ("file:/opt/ml/model", "/opt/ml/model"),
        (" file:///opt/ml ", "/opt/ml"),
        ("./s3://bucket", "s3:/bucket"),
        ("1s3://bucket", "1s3:/bucket"),
        ("model", "model"),
        ("C:\\model", "C:\\model"),
        ("C:/model", "C:/model"),
    ],
)
def test_a_path_in_every_spelling(text: str, path: str) -> None:
    assert not addresses.is_remote(text)
    assert addresses.to_path(text, "--out") == Path(path)


@pytest.mark.parametrize("text", ["file://", "file:///", "file://localhost", "file:///%00", "a\0b"])
def test_what_is_no_path_is_one_sentence(text: str) -> None:
    with pytest.raises(UserError, match="--out must be the path of a file or folder"):
        addresses.to_path(text, "--out")


@given(st.text())
def test_any_text_is_a_path_or_one_sentence(text: str) -> None:
    try:
        addresses.to_path(text, "--out")
    except UserError:
        assert addresses.is_remote(text) or "\0" in text or text.strip().lower().startswith("file:")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return an empty /opt/ml of a container."""
    (tmp_path / "ml" / "input" / "config").mkdir(parents=True)
    return tmp_path / "ml"


OUTPUTS = {
    "model_dir": ("SM_MODEL_DIR", "model"),
    "output_data_dir": ("SM_OUTPUT_DATA_DIR", "output/data"),
    "checkpoint_dir": (None, "checkpoints"),
}


PLACES = [
    (option, place)
    for option, (variable, _) in OUTPUTS.items()
    for place in ("argument", "SM_HPS", "SM_HP", "file", *(["platform"] if variable else []))
]


@pytest.mark.parametrize(("option", "place"), PLACES)
def test_in_a_container_the_platforms_folder_is_taken(root: Path, option: str, place: str) -> None:
    variable, folder = OUTPUTS[option]
    (root / "checkpoints").mkdir()
    address = "s3://bucket/prefix"
    argv, environ = [], {"SAGEMAKER_BASE_DIR": str(root)}
    if place == "argument":
        argv = [f"--{option}", address]
    elif place == "SM_HPS":
        environ["SM_HPS"] = json.dumps({option: json.dumps(address)})
    elif place == "SM_HP":
        environ[f"SM_HP_{option.upper()}"] = address
    elif place == "file":
        file = root / "input" / "config" / "hyperparameters.json"
        file.write_text(json.dumps({option: address}))
    elif variable:
        environ[variable] = f" {address} "
    found = container.read(argv, environ)
    assert getattr(found, option) == root / folder
    (warning,) = found.warnings
    assert warning.startswith(f"{option} is the address 's3://bucket/prefix'")
    assert warning.endswith(f"{root / folder}.")
    if variable and place != "platform":
        environ[variable] = str(root / "elsewhere")
        assert getattr(container.read(argv, environ), option) == root / "elsewhere"


def test_without_a_checkpoint_folder_of_the_platforms_there_is_none(root: Path) -> None:
    found = container.read(["--checkpoint_dir=s3://bucket/c"], {"SAGEMAKER_BASE_DIR": str(root)})
    assert found.checkpoint_dir is None
    assert "none here (checkpoint_s3_uri asks for one)" in found.warnings[0]


def test_a_root_that_is_an_address_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_job(["--train=x"], {"SAGEMAKER_BASE_DIR": "s3://bucket/ml"}) == 1
    assert "SAGEMAKER_BASE_DIR is the address 's3://bucket/ml'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", OUTPUTS)
def test_elsewhere_it_is_one_sentence(tmp_path: Path, option: str) -> None:
    with pytest.raises(HyperparameterError) as caught:
        container.read([f"--{option}=gs://b/c"], {"SAGEMAKER_BASE_DIR": str(tmp_path)})
    (fault,) = caught.value.faults
    assert fault.startswith(f"--{option} is the address 'gs://b/c'")


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--train=s3://bucket/pictures", "train is the address"),
        (
            "--pretrained-model=s3://bucket/model.tar.gz",
            "give one with --pretrained-model (a",
        ),
        ("--pretrained-model=https://host/model.tar.gz", "copy the model to this machine"),
        ("--class_data_dir=s3://bucket/class", "class_data_dir is the address"),
        ("--fid_features=s3://bucket/clip", "fid_features is the address"),
        ("--model_dir=s3://bucket/model", "model_dir is the address"),
    ],
)
def test_a_job_says_so_before_anything_is_made(
    small_model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    argument: str,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_pictures(tmp_path / "photos")
    argv = [f"--pretrained-model={small_model_folder}", f"--train={folder}"]
    argv += ["--model_dir=model", "--compute_fid", "--with_prior_preservation", argument]
    assert run_job(argv, {}) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert said in line
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def write_pictures(folder: Path) -> Path:
    from PIL import Image

    folder.mkdir()
    Image.new("RGB", (40, 40), (200, 100, 50)).save(folder / "1.png")
    prompts = {"instance_prompt": "a photo of riobugger cat", "class_prompt": "a photo of cat"}
    (folder / "dataset_info.json").write_text(json.dumps(prompts))
    return folder


def test_a_job_understands_file_addresses_everywhere(
    small_model_folder: Path, tmp_path: Path
) -> None:
    write_pictures(tmp_path / "photos")
    at = {name: f"file://{tmp_path}/{name}" for name in ("photos", "m", "o", "c", "class")}
    argv = [f"--pretrained-model=file://{small_model_folder}", f"--train={at['photos']}"]
    argv += [f"--model_dir={at['m']}", f"--output_data_dir={at['o']}", "--max_steps=1"]
    argv += [f"--checkpoint_dir={at['c']}", "--checkpointing_steps=1"]
    argv += [f"--class_data_dir={at['class']}"]
    assert run_job(argv, {}) == 0
    assert (tmp_path / "m" / "model_index.json").exists()
    assert (tmp_path / "o" / "report.html").exists()
    assert (tmp_path / "c" / "step-00000001").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "--model", "s3://b/m", "--prompt", "x"],
        ["generate", "--model", "tiny", "--prompt", "x", "--out", "s3://b/o"],
        ["serve", "--model", "s3://b/m"],
        ["pack", "s3://b/m", "out.tar.gz"],
        ["pack", "tiny", "s3://b/out.tar.gz"],
        ["convert", "s3://b/m", "out"],
        ["convert", "tiny", "s3://b/out"],
        ["demo", "--out", "s3://b/o"],
    ],
    ids=" ".join,
)
def test_every_verb_says_so(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 1
    assert "s3://b/" in capsys.readouterr().err
    assert not (tmp_path / "s3:").exists()


def test_the_verbs_understand_file_addresses(small_model_folder: Path, tmp_path: Path) -> None:
    assert cli.main(["pack", f"file://{small_model_folder}", f"file://{tmp_path}/m.tar.gz"]) == 0
    assert cli.main(["convert", f"file://{tmp_path}/m.tar.gz", f"file://{tmp_path}/m"]) == 0
    assert (tmp_path / "m" / "model_index.json").exists()
