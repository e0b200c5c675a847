"""Comparing rules for when to stop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dreambooth.errors import UserError
from dreambooth.training.meter import BINS, MeterReading
from tiny_world import asking, fine_tunes, score, stopping


def reading(step: int, guidance: float, convergence: float | None = None) -> MeterReading:
    return MeterReading(
        step=step,
        loss=0.5,
        losses=(0.5,) * BINS,
        drifts={"class": 0.5, "other_class": 0.2, "empty": 0.2},
        moved=0.1,
        guidance=guidance,
        convergence=convergence,
    )


def test_each_rule_chooses_a_kept_state() -> None:
    readings = [reading(80, 0.5), reading(160, 1.2, 0.9), reading(240, 2.0, 0.3), reading(320, 2.5)]
    assert stopping.chosen(readings, 400) == {
        "early_stopping": 150,
        "DVAR alone": 200,
        "drift alone": 400,
        **{"50 steps": 50, "100 steps": 100, "200 steps": 200, "400 steps": 400},
    }


def test_the_score_is_nothing_where_one_part_is() -> None:
    assert score.of_parts({**dict.fromkeys(score.PARTS, 0.5), "clean": 1.0}) == pytest.approx(5 / 9)
    assert score.of_parts({**dict.fromkeys(score.PARTS, 1.0), "clean": 0.0}) == 0


def test_signals_are_ranked_against_the_score() -> None:
    parts = dict.fromkeys(score.PARTS, 0.5)
    record = {
        "readings": [reading(step, step / 100).as_json() for step in (50, 100, 200)],
        "judged": {"60": {**parts, "clean": 0.9}, "100": parts, "250": {**parts, "clean": 0.1}},
    }
    assert stopping.correlations([record]) == {"guidance": pytest.approx(-1.0)}


def test_a_number_of_steps_that_keeps_no_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="multiple of 50"):
        stopping.read_plan(["--out", str(tmp_path), "--steps", "120"])


@pytest.mark.on_demand
def test_a_comparison_trains_judges_and_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(asking.SAMPLINGS, "7.5", (7.5, 2))
    monkeypatch.setattr(fine_tunes, "EVERY", 2)
    monkeypatch.setattr(stopping, "CONSTANT", (2, 4))
    argv = ["--out", str(tmp_path), "--data", "dog2_4", "--seeds=1", "--steps=4", "--pictures=2"]
    assert stopping.main(argv) == 0
    assert "early_stopping" in capsys.readouterr().out
    found = json.loads((tmp_path / "seed-0.json").read_text())
    assert set(found["judged"]) == {"2", "4"}
    assert not (tmp_path / "seed-0").exists()
    assert stopping.main(argv) == 0
    with pytest.raises(UserError, match="other settings"):
        stopping.main([*argv, "--center_crop"])
