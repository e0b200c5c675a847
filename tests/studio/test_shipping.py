"""The commands on a run's page, run as they stand by a shell and by Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dreambooth.runs.run_folder import Run
from dreambooth.settings import hyperparameters
from dreambooth.studio import shipping

NASTY = """$(touch hit) `touch hit` '"; touch hit #\\ {bucket} %s \N{SNOWMAN}"""
STUB = '#!/bin/sh\nfor word in "$(basename "$0")" "$@"; do printf "%s\\0" "$word"; done\necho\n'


def run_in(folder: Path, **settings: object) -> Run:
    run = Run(folder)
    folder.mkdir(parents=True)
    run.write_settings(settings)
    return run


def called(commands: str, folder: Path) -> list[list[str]]:
    """Run shell commands with stand-ins for the programs; return the words that each was given."""
    for name in ("aws", "curl", "docker", "make", "python"):
        (folder / name).write_text(STUB)
        (folder / name).chmod(0o755)
    shell = subprocess.run(
        ["bash", "-eu", "-c", commands],
        cwd=folder,
        env={"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shell.stderr == ""
    assert not (folder / "hit").exists()
    return [line.split("\0") for line in shell.stdout.split("\0\n")[:-1]]


def ran(statements: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Run Python statements with a stand-in for SageMaker's SDK; return the calls."""
    calls: list[tuple[str, Any]] = []

    class Estimator:
        def __init__(self, **given: Any) -> None:
            calls.append(("Estimator", given))

        def fit(self, inputs: Any) -> None:
            calls.append(("fit", inputs))

        def create_model(self) -> Estimator:
            return self

        def deploy(self, **given: Any) -> None:
            calls.append(("deploy", given))

    module = ModuleType("sagemaker.estimator")
    module.Estimator = Estimator  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sagemaker", ModuleType("sagemaker"))
    monkeypatch.setitem(sys.modules, "sagemaker.estimator", module)
    exec(compile(statements, "page", "exec"), {})
    return calls


def test_the_same_training_for_sagemaker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, pictures = tmp_path / "my 'base'", tmp_path / "my $pictures"
    base.mkdir()
    run = run_in(
        tmp_path / "runs" / f"0001 {NASTY.replace('/', '')}",
        train=str(pictures),
        pretrained_model=str(base),
        prediction_type="v_prediction",
        log_level="debug",
        fid_features=str(base),
        max_steps="60",
        learning_rate="2e-06",
        with_prior_preservation=True,
        sample_prompt=NASTY,
    )
    calls = ran(shipping.sagemaker(run), monkeypatch)
    assert [name for name, _ in calls] == ["Estimator", "fit", "deploy"]
    place = f"s3://<your bucket>/{run.name}"
    estimator = calls[0][1]
    assert estimator["model_uri"] == f"{place}/base.tar.gz"
    assert calls[1][1] == {"training": f"{place}/pictures/"}
    given = estimator["hyperparameters"]
    assert all(isinstance(value, str) for value in given.values())
    settings = run.settings()
    kept = {name: settings[name] for name in given}
    assert hyperparameters.parse(given).hyperparameters == (
        hyperparameters.parse(kept).hyperparameters
    )
    assert settings.keys() - given.keys() == {
        *("train", "log_level", "pretrained_model", "prediction_type", "fid_features")
    }
    assert "a path of this machine: fid_features" in shipping.sagemaker(run)

    assert called(shipping.uploads(run), tmp_path) == [
        ["aws", "s3", "cp", "--recursive", str(pictures), f"{place}/pictures/"],
        ["python", "-m", "dreambooth", "pack", str(base), "base.tar.gz"],
        ["aws", "s3", "cp", "base.tar.gz", f"{place}/base.tar.gz"],
    ]


def test_the_embedded_model_and_a_single_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_in(tmp_path / "0001", train=str(tmp_path), pretrained_model="tiny")
    calls = ran(shipping.sagemaker(run), monkeypatch)
    assert "model_uri" not in calls[0][1]
    assert calls[0][1]["hyperparameters"] == {"pretrained_model": "tiny"}
    assert "base.tar.gz" not in shipping.uploads(run)

    file = tmp_path / "v2 model.safetensors"
    file.touch()
    run = run_in(
        tmp_path / "0002",
        train="s3://theirs/pictures/",
        pretrained_model=str(file),
        prediction_type="epsilon",
        base=str(tmp_path),
    )
    calls = ran(shipping.sagemaker(run), monkeypatch)
    assert calls[0][1]["hyperparameters"] == {}
    assert calls[1][1] == {"training": "s3://theirs/pictures/"}
    assert called(shipping.uploads(run), tmp_path)[0] == [
        *("python", "-m", "dreambooth", "convert", str(file), "base"),
        *("--base", str(tmp_path), "--prediction_type", "epsilon"),
    ]


def test_serving_and_asking(tmp_path: Path) -> None:
    run = run_in(tmp_path / "a, \"b\" 'c' $d:e" / "0001", train=str(tmp_path))
    model = str(run.folder / "model")
    quoted = '"source=' + model.replace('"', '""') + '"'
    assert called(shipping.docker(run, has_gpu=True), tmp_path) == [
        ["make", "image"],
        [
            *("docker", "run", "--rm", "--gpus", "all", "-p", "8080:8080", "--mount"),
            f"type=bind,{quoted},target=/opt/ml/model,readonly",
            *("dreambooth", "serve"),
        ],
    ]
    assert "--gpus" not in shipping.docker(run, has_gpu=False)
    assert called(shipping.serve(run), tmp_path) == [
        ["python", "-m", "dreambooth", "serve", "--model", model]
    ]
    for seed, body in (("7", {"prompt": NASTY, "seed": 7}), ("", {"prompt": NASTY})):
        asked = called(shipping.request(NASTY, seed, port=8123), tmp_path)
        assert asked[0][2] == "http://127.0.0.1:8123/invocations"
        assert json.loads(asked[0][-1]) == body
