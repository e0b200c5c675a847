"""The command as a user types it, on the embedded model with few pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dreambooth import tiny
from dreambooth.__main__ import main

FEW = ("--pictures", "1", "--num_inference_steps", "2", "--batch_size", "8")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned") / "model"
    shutil.copytree(tiny.WEIGHTS, folder)
    info = {"resolution": 64, "instance_prompt": "a photo of a riobugger cat"}
    (folder / "__model_info__.json").write_text(json.dumps(info))
    return folder


def evaluate(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[list[str], dict[str, Any]]:
    assert main(["evaluate", "tiny", *FEW, *argv]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    return lines, json.loads(last)


def test_a_tuned_model_is_asked_about_its_subject(
    tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    lines, result = evaluate(
        capsys, "--model", str(tuned), "--base", "tiny", "--out", str(out), "--disagreements"
    )
    assert result["subject"] == "riobugger"
    assert result["pictures"] == 1
    assert result["measures"]["the subject"]["of"] == 1
    assert result["measures"]["the subject"]["goal"] == ">= 0.85"
    # The same weights on the same noise: the base's answers are the model's.
    assert result["base"]["measures"] == result["measures"]
    assert any("MISSED" in line for line in lines)
    for name in ("sheet.png", "disagreements.png"):
        with Image.open(out / name) as sheet:
            assert sheet.width > 64


def test_the_subject_can_be_named(tuned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--model", str(tuned), "--subject", "vorbit", "--json-only")
    lines, result = evaluate(capsys, *options)
    assert lines == []
    prompts = {question["prompt"] for question in result["questions"]}
    assert "a photo of a vorbit chair in red" in prompts
    assert result["base"] is None


def test_a_base_model_is_asked_for_the_world_and_keeps_the_figures(
    tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny.WEIGHTS, base)
    _, result = evaluate(
        capsys, "--model", str(base), "--json-only", "--record", "--num_inference_steps", "1"
    )
    assert result["subject"] is None
    assert {"species", "color", "marking", "collar", "seat", "setting", "style"} == set(
        result["measures"]
    )
    assert result["variety"]["bits"] is None
    recorded = json.loads((base / "recipe.json").read_text())
    assert recorded["judged"]["measures"] == result["measures"]
    assert recorded["figures"]  # what else stood there stays


def test_wrong_options_are_one_sentence(
    tuned: Path, make_model_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for argv, said in (
        (["--model", str(tuned), "--subject", "rex"], "riobugger"),
        (["--model", str(make_model_folder()), "--subject", "riobugger"], "64 x 64"),
        (["--model", "no-such-folder"], "no-such-folder"),
        (["--model", str(make_model_folder()), "--record"], "recipe.json"),
        (["--out", str(tuned / "model_index.json" / "out")], "--out"),
        (["--out", str(tuned.parent / "o"), "--base", "no-such-base"], "no-such-base"),
    ):
        assert main(["evaluate", "tiny", "--pictures", "1", *argv]) == 1
        shown = capsys.readouterr().err
        assert shown.startswith("error: ")
        assert said in shown
    with pytest.raises(SystemExit):
        main(["evaluate", "tiny", "--pictures", "0"])
