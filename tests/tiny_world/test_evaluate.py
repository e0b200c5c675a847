"""`evaluate` as a user runs it, on the embedded model with few pictures."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dreambooth import tiny
from tiny_world.__main__ import main

FEW = ("--pictures", "1", "--num_inference_steps", "2", "--batch_size", "8")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned") / "model"
    shutil.copytree(tiny.WEIGHTS, folder)
    info = {"resolution": 64, "instance_prompt": "a photo of a riobugger cat"}
    (folder / "__model_info__.json").write_text(json.dumps(info))
    return folder


def evaluate(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[list[str], dict[str, Any]]:
    assert main(["evaluate", *FEW, *argv]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    return lines, json.loads(last)


def assert_intervals(lines: list[str], result: dict[str, Any]) -> None:
    """Assert that the JSON line and the table give each share's 95 % interval (Wilson, 1927)."""
    for column in ("question", "measure"):
        (head,) = [line for line in lines if line.startswith(column)]
        assert head.split()[-5:-1] == ["share", "95", "%", "interval"]
        assert head.endswith("base")
    rows = [(each["prompt"], each) for each in result["questions"]]
    rows += list(result["measures"].items())
    assert rows
    for name, row in rows:
        assert 0 <= row["low"] <= row["share"] <= row["high"] <= 1
        assert row["share"] == row["right"] / row["of"]
        low, high = wilson(row["right"], row["of"])
        assert (row["low"], row["high"]) == pytest.approx((low, high), abs=1e-4)
        printed = rf"{row['share']:.3f}  {low:.3f}\.\.{high:.3f}  "
        assert any(re.search(rf"^{re.escape(name)} .*{printed}", line) for line in lines), name


def wilson(right: int, of: int) -> tuple[float, float]:
    """Return the shares p at which right / of - p is 1.96 standard deviations.

    They are the roots of a quadratic.
    """
    share, z = right / of, 1.959964
    a, b, c = 1 + z**2 / of, -(2 * share + z**2 / of), share**2
    root = max(0.0, b**2 - 4 * a * c) ** 0.5
    return max(0.0, (-b - root) / (2 * a)), min(1.0, (-b + root) / (2 * a))


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
    # Both models have the same weights and draw from the same noise, so their answers agree.
    assert result["base"]["measures"] == result["measures"]
    assert any("MISSED" in line for line in lines)
    assert_intervals(lines, result)
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


@pytest.mark.on_demand
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
    assert recorded["figures"]  # the rest of the file is kept


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
        assert main(["evaluate", "--pictures", "1", *argv]) == 1
        shown = capsys.readouterr().err
        assert shown.startswith("error: ")
        assert said in shown
    with pytest.raises(SystemExit):
        main(["evaluate", "--pictures", "0"])
