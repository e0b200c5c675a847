from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import survive
from benchmarks.__main__ import parser
from benchmarks.survive import Setup, SurvivalResult


@pytest.mark.on_demand
def test_a_run_that_is_killed_again_and_again_loses_nothing(
    small_model_folder: Path, tmp_path: Path
) -> None:
    setup = Setup(model=small_model_folder, steps=8, class_images=2)
    result = survive.run(tmp_path, setup, kills=4, seed=1)
    assert result.faults == []
    assert result.kills == sum(result.phases.values()) == 4
    assert result.runs >= 1


def test_the_last_line_is_json_and_a_fault_is_exit_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = SurvivalResult(kills=2, runs=1, faults=["a half model after kill 1"])
    seen.phases.update(["training", "training"])
    monkeypatch.setattr(survive, "run", lambda *_, **__: seen)
    assert survive.main(parser().parse_args(["survive", "--kills", "2"])) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "FAULT: a half model after kill 1" in lines
    summary = json.loads(lines[-1])
    assert (summary["kills"], summary["faults"]) == (2, 1)
    assert summary["kills_by_phase"] == {"training": 2}
