"""compute_fid in real jobs: the printed score, and faults in it that must not cost the model."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from dreambooth import tiny
from dreambooth.errors import ModelArtifactError
from dreambooth.evaluation import features, scores
from dreambooth.job import fid
from dreambooth.job.run import run_job
from dreambooth.model_folder import pack
from dreambooth.process.stop import Stopped

STATED = (
    "Frechet distance between {given} instance images and {drawn} drawn with the instance prompt; "
    "features: {features}; no regularisation (singular covariances are used as they are)"
)
JUDGE = "the judge of the embedded world"
Start = Callable[..., int]


def fid_score(
    out: Path, capsys: pytest.CaptureFixture[str], *, steps: int, learning_rate: float
) -> float:
    code = run_job(
        [
            *("--pretrained-model", "tiny", "--train", str(tiny.DATA / "cat")),
            *("--model_dir", str(out), "--max_steps", str(steps)),
            *("--learning_rate", str(learning_rate), "--compute_fid", "True"),
        ],
        {},
    )
    shown = capsys.readouterr()
    assert code == 0, shown.err
    assert STATED.format(given=8, drawn=8, features=JUDGE) in shown.err
    assert "fid_score=" not in shown.err
    (score,) = re.findall(r"^fid_score=([0-9.]+)$", shown.out, re.MULTILINE)
    return float(score)


def test_the_score_falls_when_the_subject_is_learned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dreambooth.job.previews.NUM_INFERENCE_STEPS", 15)
    unlearned = fid_score(tmp_path / "unlearned", capsys, steps=1, learning_rate=1e-9)
    learned = fid_score(tmp_path / "learned", capsys, steps=100, learning_rate=2e-4)
    assert 0 < learned < 0.6 * unlearned


@pytest.fixture
def start(small_model_folder: Path, tmp_path: Path) -> Start:
    """Return a function that runs a job with compute_fid on three pictures.

    The model is written to `tmp_path / "model"`.
    """
    photos = tmp_path / "photos"
    photos.mkdir()
    generator = np.random.default_rng(0)
    for number in range(3):
        pixels = generator.integers(0, 255, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{number}.png")
    (photos / "dataset_info.json").write_text('{"instance_prompt": "a photo of riobugger cat"}')
    (tmp_path / "output").mkdir()

    def run(
        *options: str, model: Path | str = small_model_folder, environ: Any = None, out: str = ""
    ) -> int:
        argv = [f"--pretrained-model={model}", f"--train={photos}", "--compute_fid"]
        argv += [f"--model_dir={tmp_path / (out or 'model')}", "--max_steps=2", *options]
        return run_job(argv, {"SAGEMAKER_BASE_DIR": str(tmp_path), **(environ or {})})

    return run


@pytest.fixture
def vit_folder(tmp_path: Path) -> Path:
    config = transformers.ViTConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def test_the_log_states_count_regularisation_and_features(
    start: Start, vit_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    for options, name in (
        ([], "EfficientNet-Lite0, trained on ImageNet"),
        ([f"--fid_features={vit_folder}"], f"ViTModel of {vit_folder}"),
    ):
        assert start(*options) == 0
        shown = capsys.readouterr()
        assert STATED.format(given=3, drawn=8, features=name) in shown.err
        assert "LOAD REPORT" not in shown.err + shown.out
        assert "Loading weights" not in shown.err + shown.out


@pytest.mark.parametrize("level", ["30", "40"])
def test_the_tuners_lines_are_bare_on_stdout_at_every_log_level(
    start: Start, capsys: pytest.CaptureFixture[str], level: str
) -> None:
    assert start(environ={"SM_LOG_LEVEL": level}) == 0
    shown = capsys.readouterr()
    (score,) = re.findall(r"^fid_score=(\d+\.\d+)$", shown.out, re.MULTILINE)
    (loss,) = re.findall(r"^End of training: train_avg_loss=(\d\.\d+)$", shown.out, re.MULTILINE)
    assert "fid_score=" not in shown.err
    assert "train_avg_loss=" not in shown.err
    # The regular expressions of JumpStart's metric definitions.
    assert re.findall(r"train_avg_loss=([0-9\.]+)", shown.out) == [loss]
    (seen,) = re.findall(r"fid_score=([-+]?\d\.?\d*)", shown.out)
    assert score.startswith(seen)


@pytest.mark.parametrize("more", [["--dry-run"], []])
@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (None, "There is no folder"),
        ({"model_type": "bert"}, "is of the type 'bert'"),
        ({"model_type": "vit", "image_size": None}, "gives image_size as null"),
    ],
)
def test_a_wrong_fid_features_is_reported_before_anything_heavy(
    start: Start,
    tmp_path: Path,
    vit_folder: Path,
    capsys: pytest.CaptureFixture[str],
    config: object,
    sentence: str,
    more: list[str],
) -> None:
    if config is None:
        shutil.rmtree(vit_folder)
    else:
        (vit_folder / "config.json").write_text(json.dumps(config))
    assert start(f"--fid_features={vit_folder}", *more) == 1
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    assert shown.splitlines()[-1].startswith("error: fid_features: ")
    assert sentence in shown.splitlines()[-1]
    assert str(vit_folder) in (tmp_path / "output" / "failure").read_text()
    assert not (tmp_path / "model").exists()


def test_weights_that_cannot_be_used_are_reported_before_training(
    start: Start, vit_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((vit_folder / "config.json").read_text())
    (vit_folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    assert start(f"--fid_features={vit_folder}") == 1
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    assert re.match(r"error: fid_features: .* lacks the weights ", shown.splitlines()[-1])
    assert "training: " not in shown


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (RuntimeError("something\nodd"), "RuntimeError: something odd"),
        (ModelArtifactError("The folder is gone."), "The folder is gone."),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "memory ran out while it was drawn"),
        (MemoryError(), "memory ran out while it was drawn"),
        (np.linalg.LinAlgError("SVD did not converge"), "LinAlgError: SVD did not converge"),
    ],
)
def test_no_fault_in_scoring_costs_the_model_or_the_report(
    start: Start,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fault: Exception,
    sentence: str,
) -> None:
    def fail(*_: object) -> float:
        # The model is written before the score.
        assert (tmp_path / "model" / "model_index.json").is_file()
        raise fault

    monkeypatch.setattr(scores, "frechet_distance", fail)
    assert start() == 0
    shown = capsys.readouterr()
    assert "fid_score=" not in shown.out + shown.err
    assert "Traceback" not in shown.err
    assert "fails here" not in shown.err
    (warning,) = [line for line in shown.err.splitlines() if "no fid_score" in line]
    assert f" WARNING [fid_score, step 2] no fid_score: {sentence}" in warning
    assert (tmp_path / "model" / "model_index.json").is_file()
    assert "no fid_score" in (tmp_path / "model-output" / "report.html").read_text()
    assert not (tmp_path / "output" / "failure").exists()


@pytest.mark.parametrize("end", [KeyboardInterrupt(), SystemExit(3), Stopped(signal.SIGTERM)])
def test_what_ends_a_process_ends_the_scoring(
    monkeypatch: pytest.MonkeyPatch, end: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise end

    monkeypatch.setattr(fid, "_print_score", fail)
    nothing: Any = None
    with pytest.raises(type(end)):
        fid.print_score(nothing, nothing, nothing)


def test_features_that_are_not_finite_give_no_score(
    start: Start, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = features.FeatureNetwork(name="a test", one=lambda _: torch.full((4,), torch.nan))
    monkeypatch.setattr(features, "choose", lambda *_, **__: broken)
    assert start() == 0
    shown = capsys.readouterr()
    assert "no fid_score: Features of a test are not finite." in shown.err
    assert "fid_score=" not in shown.out


def test_any_copy_and_any_child_of_the_embedded_model_is_judged(
    start: Start,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    make_model_folder: Callable[..., Path],
) -> None:
    pack.write(str(tiny.WEIGHTS), tmp_path / "tiny.tar.gz")
    monkeypatch.chdir(tmp_path)
    for number, model in enumerate(("tiny.tar.gz", tmp_path / "tuned0")):
        assert start(model=model, out=f"tuned{number}") == 0
        assert f"features: {JUDGE};" in capsys.readouterr().err, model
    # As large as the embedded model's pictures, but of another world.
    other = make_model_folder(pixels=64)
    assert start(model=other, out="other") == 0
    assert "features: EfficientNet-Lite0, trained on ImageNet;" in capsys.readouterr().err
