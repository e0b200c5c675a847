"""The job as users start it: real runs on a miniature model, mostly in this process."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from dreambooth.job.run import run_job
from dreambooth.tiny import DATA

pytestmark = pytest.mark.usefixtures("class_images_of_four_steps")
ROOT = Path(__file__).parents[2]
Folder = Callable[..., Path]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    write_photos(folder, 3)
    (folder / "dataset_info.json").write_text(
        json.dumps(
            {"instance_prompt": "a photo of riobugger cat", "class_prompt": "a photo of cat"}
        )
    )
    return folder


def write_photos(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for number in range(count):
        pixels = generator.integers(0, 255, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")


def train(model: Path, photos: Path, out: Path, *more: str, environ: object = None) -> int:
    argv = ["--pretrained-model", str(model), "--train", str(photos), "--model_dir", str(out)]
    return run_job([*argv, "--max_steps=2", *more], dict(environ or {}))  # type: ignore[call-overload]


def unet_of(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def test_a_plain_command_line_writes_a_whole_model(
    small_model_folder: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "model"
    assert train(small_model_folder, photos, out) == 0
    files = {str(path.relative_to(out)) for path in out.iterdir()}
    assert files == {
        *("model_index.json", "__model_info__.json", "hyperparameters.json", "README.md"),
        *("samples", "unet", "vae", "text_encoder", "tokenizer", "scheduler"),
    }
    metrics = (tmp_path / "model-output" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics] == [1, 2]
    before, after = unet_of(small_model_folder), unet_of(out)
    assert any(not np.array_equal(before[name], after[name]) for name in before)
    assert json.loads((out / "__model_info__.json").read_text())["resolution"] == 32
    assert json.loads((out / "hyperparameters.json").read_text())["max_steps"] == "2"


def test_two_runs_are_bit_identical(small_model_folder: Path, photos: Path, tmp_path: Path) -> None:
    runs = [tmp_path / "a", tmp_path / "b"]
    for out in runs:
        assert train(small_model_folder, photos, out, "--with_prior_preservation=False") == 0
    digests = [
        hashlib.sha256(
            (out / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
        ).hexdigest()
        for out in runs
    ]
    assert digests[0] == digests[1]


def test_the_result_is_a_pretrained_model_again(
    small_model_folder: Path, photos: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert train(small_model_folder, photos, first) == 0
    assert train(first, photos, second, "--learning_rate=0.001") == 0
    a, b = unet_of(first), unet_of(second)
    assert any(not np.array_equal(a[name], b[name]) for name in a)


def test_prior_preservation_samples_what_is_missing_and_keeps_it(
    small_model_folder: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_photos(photos / "class_data_dir", 2)
    out = tmp_path / "model"
    options = ["--with_prior_preservation", "--num_class_images=4", "--batch_size=2"]
    assert train(small_model_folder, photos, out, *options) == 0
    sampled = sorted((tmp_path / "model-output" / "class_images").iterdir())
    assert [path.name for path in sampled] == ["class_00000.png", "class_00001.png", "latents"]
    times = [path.stat().st_mtime_ns for path in sampled]
    row = json.loads((tmp_path / "model-output" / "metrics.jsonl").read_text().splitlines()[0])
    assert row["class_loss"] > 0
    # The input folder is never written to.
    assert len(list((photos / "class_data_dir").iterdir())) == 2
    assert train(small_model_folder, photos, out, *options) == 0  # nothing is sampled again
    assert [path.stat().st_mtime_ns for path in sampled] == times
    shown = capsys.readouterr().err
    assert "sampling class images: 2/2" in shown


def test_a_read_only_training_folder_is_enough(
    small_model_folder: Path, photos: Path, tmp_path: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in photos.rglob("*")}
    os.chmod(photos, stat.S_IRUSR | stat.S_IXUSR)
    try:
        options = ["--with_prior_preservation", "--num_class_images=1"]
        assert train(small_model_folder, photos, tmp_path / "model", *options) == 0
    finally:
        os.chmod(photos, stat.S_IRWXU)
    assert {path: path.stat().st_mtime_ns for path in photos.rglob("*")} == before


def test_script_mode_reads_arguments_and_variables(
    small_model_folder: Path, photos: Path, tmp_path: Path
) -> None:
    environ = {
        "SM_CHANNEL_TRAINING": str(photos),
        "SM_CHANNEL_MODEL": str(small_model_folder),
        "SM_MODEL_DIR": str(tmp_path / "model"),
        "SM_OUTPUT_DATA_DIR": str(tmp_path / "data"),
        "SM_HPS": json.dumps({"max_steps": 5, "learning_rate": 0.001}),
        "SAGEMAKER_BASE_DIR": str(tmp_path),
    }
    assert run_job(["--max_steps", "1"], environ) == 0
    stored = json.loads((tmp_path / "model" / "hyperparameters.json").read_text())
    assert stored["max_steps"] == "1"
    assert stored["learning_rate"] == "0.001"
    assert (tmp_path / "data" / "metrics.jsonl").is_file()


@pytest.fixture
def container(small_model_folder: Path, photos: Path, tmp_path: Path) -> Path:
    """Return an /opt/ml tree as SageMaker lays it out."""
    root = tmp_path / "ml"
    (root / "input" / "config").mkdir(parents=True)
    (root / "input" / "data").mkdir()
    (root / "output").mkdir()
    shutil.copytree(photos, root / "input" / "data" / "training")
    shutil.copytree(small_model_folder, root / "input" / "data" / "model")
    return root


def set_hyperparameters(root: Path, values: dict[str, str]) -> None:
    path = root / "input" / "config" / "hyperparameters.json"
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    "values",
    [
        {"max_steps": "1", "center_crop": "True", "lr_warmup_steps": "None"},
        {"max_steps": '"1"', "center_crop": '"True"', "lr_warmup_steps": '"None"'},
        {"max_steps": "1", "center_crop": "true", "lr_warmup_steps": "null"},
        {"max_steps": "'1'", "center_crop": "'true'", "lr_warmup_steps": ""},
    ],
    ids=["bring your own", "source_dir", "script mode and v3", "quoted by hand"],
)
def test_a_container_reads_hyperparameters_in_every_encoding(
    container: Path, values: dict[str, str]
) -> None:
    set_hyperparameters(
        container, {**values, "sagemaker_program": '"transfer_learning.py"', "_tuning_x": "1"}
    )
    assert run_job([], {"SAGEMAKER_BASE_DIR": str(container)}) == 0
    stored = json.loads((container / "model" / "hyperparameters.json").read_text())
    assert stored["max_steps"] == "1"
    assert stored["center_crop"] == "True"
    assert stored["lr_warmup_steps"] == "None"
    assert (container / "output" / "data" / "metrics.jsonl").is_file()
    assert not (container / "output" / "failure").exists()


def test_all_wrong_values_are_reported_at_once(
    container: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    set_hyperparameters(
        container, {"learning_rate": "-1", "max_steps": "many", "lr_scheduler": "sawtooth"}
    )
    assert run_job([], {"SAGEMAKER_BASE_DIR": str(container)}) == 1
    failure = (container / "output" / "failure").read_text()
    shown = capsys.readouterr().err
    for name in ("learning_rate", "max_steps", "lr_scheduler"):
        assert name in failure
        assert name in shown
    assert len(failure.encode()) <= 1024
    assert not (container / "model").exists()


def test_the_exit_code_stands_where_the_failure_file_cannot_be_written(
    container: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(container / "output")
    (container / "output").write_text("in the way")
    set_hyperparameters(container, {"max_steps": "0"})
    assert run_job([], {"SAGEMAKER_BASE_DIR": str(container)}) == 1
    assert "max_steps" in capsys.readouterr().err


def test_a_job_without_a_model_says_how_to_give_one(
    container: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(container / "input" / "data" / "model")
    assert run_job([], {"SAGEMAKER_BASE_DIR": str(container)}) == 1
    failure = (container / "output" / "failure").read_text()
    assert "as the channel `model` or in the hyperparameter pretrained_model" in failure
    assert "tiny" in failure


def test_a_diverging_run_leaves_no_model(
    small_model_folder: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model"
    options = [
        "--learning_rate=1",
        "--max_steps=200",
        "--max_grad_norm=1e9",
        "--adam_epsilon=1e-30",
    ]
    code = train(small_model_folder, photos, out, *options, "--adam_weight_decay=1000")
    assert code == 1
    assert "diverged" in capsys.readouterr().err
    assert not (out / "model_index.json").exists()
    assert not list(out.glob(".partial-*"))


def test_resuming_equals_the_unbroken_run(
    small_model_folder: Path, photos: Path, tmp_path: Path
) -> None:
    options = ["--max_steps=4", "--checkpointing_steps=2", "--checkpoints_total_limit=2"]
    one, two = tmp_path / "one", tmp_path / "two"
    checkpoints = tmp_path / "checkpoints"
    assert train(small_model_folder, photos, one, *options) == 0
    argument = f"--checkpoint_dir={checkpoints}"
    assert train(small_model_folder, photos, two, *options, argument) == 0
    shutil.rmtree(checkpoints / "step-00000004")  # as if the run had stopped after step 2
    assert train(small_model_folder, photos, two, *options, argument) == 0
    rows = [
        json.loads(line)["step"]
        for line in (tmp_path / "two-output" / "metrics.jsonl").read_text().splitlines()
    ]
    assert rows == [1, 2, 3, 4]
    a, b = unet_of(one), unet_of(two)
    assert all(np.array_equal(a[name], b[name]) for name in a)


def test_a_changed_setting_refuses_to_resume_unless_resume_is_fresh(
    small_model_folder: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, options = tmp_path / "model", [f"--checkpoint_dir={tmp_path / 'c'}"]
    options.append("--checkpointing_steps=1")
    assert train(small_model_folder, photos, out, *options) == 0
    assert train(small_model_folder, photos, out, *options, "--seed=7") == 1
    assert "seed was 0 and is now 7" in capsys.readouterr().err
    assert train(small_model_folder, photos, out, *options, "--seed=7", "--resume=fresh") == 0


LAUNCHED = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        (LAUNCHED, "MASTER_ADDR is not set"),
        ({**LAUNCHED, "MASTER_ADDR": "localhost"}, "this one is in a group of 1"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE says"),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, "PMI_SIZE says that 2 processes train together"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
    ],
)
def test_a_process_that_would_train_alone_among_several_ends_in_one_sentence(
    small_model_folder: Path,
    photos: Path,
    tmp_path: Path,
    environ: dict[str, str],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train(small_model_folder, photos, tmp_path / "model", environ=environ) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert said in line
    assert "torchrun" in line
    assert not (tmp_path / "model").exists()


def test_an_epoch_of_two_processes_is_one_pass_over_the_pictures(
    small_model_folder: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--pretrained-model", str(small_model_folder), "--train", str(photos), "--dry-run"]
    assert run_job([*argv, "--epochs=4"], {"WORLD_SIZE": "2"}) == 0
    assert (
        "6 (4 epochs of 3 instance images, 2 processes: global batch 2)" in capsys.readouterr().out
    )
    assert run_job([*argv, "--epochs=4"], {"WORLD_SIZE": "2", "RANK": "1"}) == 0
    assert "epochs" not in capsys.readouterr().out


def test_dry_run_prints_the_plan_quickly_and_loads_nothing(
    small_model_folder: Path, photos: Path, tmp_path: Path
) -> None:
    code = (
        "import sys; from dreambooth.job.run import run_job; code = run_job(sys.argv[1:], {}); "
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules; sys.exit(code)"
    )
    argv = ["--pretrained-model", str(small_model_folder), "--train", str(photos), "--dry-run"]
    argv += ["--model_dir", str(tmp_path / "model")]
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    for part in ("steps", "60 (20 epochs of 3", "pictures", "fp32", "learning rate", "expected"):
        assert part in done.stdout
    assert not (tmp_path / "model").exists()


def test_the_scripts_failure_is_one_sentence_and_exit_code_1(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "transfer_learning.py", "--train", str(tmp_path / "none")],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_help_lists_every_hyperparameter() -> None:
    done = subprocess.run(
        [sys.executable, "transfer_learning.py", "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    from dataclasses import fields

    from dreambooth.settings.hyperparameters import Hyperparameters

    for knob in fields(Hyperparameters):
        assert re.search(rf"--{knob.name}\b", done.stdout) or re.search(
            rf"--{knob.name.replace('_', '-')}\b", done.stdout
        ), knob.name


def test_a_stop_signal_ends_with_its_exit_code_and_a_usable_partial_model(
    small_model_folder: Path, photos: Path, tmp_path: Path
) -> None:
    argv = ["--pretrained-model", str(small_model_folder), "--train", str(photos)]
    argv += ["--model_dir", str(tmp_path / "model"), "--max_steps", "100000"]
    process = subprocess.Popen(
        [sys.executable, "transfer_learning.py", *argv], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "model-output" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 143, shown
    card = (tmp_path / "model" / "README.md").read_text()
    assert re.search(r"\*\*Partial: the run was stopped after \d+ of 100000 planned", card)
    assert (tmp_path / "model-output" / "report.html").is_file()
    assert train(tmp_path / "model", photos, tmp_path / "second") == 0


class StopAt(io.StringIO):
    """A stderr that sends a signal to this process when `text` is written to it."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__()
        self._text, self._number = text, number

    def write(self, text: str) -> int:
        if self._text and self._text in text:
            self._text = ""
            os.kill(os.getpid(), self._number)
        return super().write(text)


def stopped_at(monkeypatch: pytest.MonkeyPatch, text: str, number: int = signal.SIGTERM) -> StopAt:
    stderr = StopAt(text, number)
    monkeypatch.setattr(sys, "stderr", stderr)
    return stderr


@pytest.mark.parametrize("text", ["[class images]", "[loading the model]", "[encoding]"])
def test_a_stop_before_training_leaves_nothing_half_done(
    small_model_folder: Path,
    photos: Path,
    tmp_path: Path,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stderr = stopped_at(monkeypatch, text)
    options = ["--with_prior_preservation", "--num_class_images=2"]
    assert train(small_model_folder, photos, tmp_path / "model", *options) == 143
    assert stderr.getvalue().endswith("stopped by SIGTERM\n")
    assert not (tmp_path / "model").exists()
    folder = tmp_path / "model-output" / "class_images"
    sampled = sorted(path.name for path in folder.rglob("*") if path.is_file())
    names = [f"class_0000{n}{end}" for n in (0, 1) for end in (".png", ".safetensors")]
    assert sampled == ([] if text == "[class images]" else names)


@pytest.mark.parametrize(
    ("text", "number"),
    [("training: 0/6", signal.SIGINT), ("checkpoint of step 2 written", signal.SIGTERM)],
    ids=["SIGINT", "SIGTERM"],
)
def test_a_stop_in_training_with_a_checkpoint_folder_resumes_bit_for_bit(
    small_model_folder: Path,
    photos: Path,
    tmp_path: Path,
    text: str,
    number: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = ["--max_steps=6", "--checkpointing_steps=2"]
    stopped, unbroken = tmp_path / "stopped", tmp_path / "unbroken"
    options.append(f"--checkpoint_dir={tmp_path / 'c'}")
    with monkeypatch.context() as patched:
        stopped_at(patched, text, number)
        assert train(small_model_folder, photos, stopped, *options) == 128 + number
    assert len(list((tmp_path / "c").iterdir())) == 1
    assert "**Partial:" in (stopped / "README.md").read_text()
    assert train(small_model_folder, photos, stopped, *options) == 0
    assert "Partial" not in (stopped / "README.md").read_text()
    assert train(small_model_folder, photos, unbroken, "--max_steps=6") == 0
    a, b = unet_of(stopped), unet_of(unbroken)
    assert all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "text",
    [
        *("[sample pictures", "[fid_score", "drawing for fid_score: 0/", "[export"),
        "drawing with the base model: 0/",
    ],
)
def test_a_stop_after_the_last_step_leaves_the_whole_model(
    small_model_folder: Path,
    photos: Path,
    tmp_path: Path,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stderr = stopped_at(monkeypatch, text)
    out = tmp_path / "model"
    scores = ("--compute_fid", "--compute_scores")
    assert train(small_model_folder, photos, out, *scores) == 143
    shown = capsys.readouterr().out
    assert ("fid_score=" in shown) is ("base" in text)
    assert "subject_score=" not in shown
    assert "no fid_score" not in stderr.getvalue()  # a stop is not reported as a fault
    assert "The run was stopped" in (tmp_path / "model-output" / "report.html").read_text()
    assert "Partial" not in (out / "README.md").read_text()
    assert (out / "model_index.json").is_file()
    assert not list(out.glob(".partial-*"))


def test_accelerates_configuration_does_not_change_the_precision(
    small_model_folder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.state import AcceleratorState

    assert train(small_model_folder, photos, tmp_path / "plain") == 0
    AcceleratorState._reset_state(True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert train(small_model_folder, photos, tmp_path / "set") == 0
    a, b = unet_of(tmp_path / "plain"), unet_of(tmp_path / "set")
    assert all(np.array_equal(a[name], b[name]) for name in a)


def test_a_plan_that_nobody_reads_is_no_error(
    small_model_folder: Path, photos: Path, tmp_path: Path
) -> None:
    common = f"{sys.executable} transfer_learning.py --pretrained-model {small_model_folder}"
    common += f" --train {photos} --model_dir {tmp_path / 'model'} --dry-run"
    for redirection in ("| true", ">/dev/full", ">&-", "2>&-"):
        command = f"set -o pipefail; {common} {redirection}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, (redirection, done.stderr)
        assert "Traceback" not in done.stderr
        assert "Exception ignored" not in done.stderr


def test_the_average_loss_of_a_resumed_run_is_that_of_all_steps(
    small_model_folder: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--checkpointing_steps=1", f"--checkpoint_dir={tmp_path / 'c'}"]
    last_lines = []
    for _ in range(2):  # the second run finds all steps done
        assert train(small_model_folder, photos, tmp_path / "model", *options) == 0
        shown = capsys.readouterr().out
        found = re.findall(r"^End of training: train_avg_loss=([\d.]+)$", shown, re.MULTILINE)
        last_lines.append(found)
    assert last_lines[0] == last_lines[1]
    assert len(last_lines[0]) == 1


@pytest.mark.parametrize("toolkit", [False, True])
def test_a_source_dir_that_is_not_used_is_reported(
    toolkit: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "input" / "config"
    config.mkdir(parents=True)
    settings = {"sagemaker_submit_directory": '"/opt/ml/code"', "pretrained_model": "tiny"}
    (config / "hyperparameters.json").write_text(json.dumps(settings))
    environ = {"SAGEMAKER_BASE_DIR": str(tmp_path)}
    if toolkit:
        environ["SM_MODULE_DIR"] = "/opt/ml/code"
    assert run_job(["--train", str(DATA / "cat"), "--dry-run"], environ) == 0
    assert ("this image runs its own code" in capsys.readouterr().err) is not toolkit


def test_a_promised_gpu_that_cannot_be_used_ends_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    argv = ["--pretrained-model", "tiny", "--train", str(DATA / "cat"), "--model_dir"]
    environ = {"SAGEMAKER_BASE_DIR": str(tmp_path), "SM_NUM_GPUS": "1"}
    assert run_job([*argv, str(tmp_path / "model")], environ) == 1
    assert "SM_NUM_GPUS=1 promises a GPU" in capsys.readouterr().err
    assert "SM_NUM_GPUS=1" in (tmp_path / "output" / "failure").read_text()
