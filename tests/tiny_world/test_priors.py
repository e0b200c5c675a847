from __future__ import annotations

import json
from pathlib import Path

import pytest
from scipy.stats import t

from tiny_world import asking, priors, tables

OPTIONS = (
    *("--seeds", "2", "--steps", "1", "--learning_rate", "1e-6", "--prior", "off"),
    *("--pictures", "1", "--guidance", "3.5"),
)


def test_the_interval_over_seeds_is_students() -> None:
    for values in ([0.5, 0.7], [0.8, 0.9, 0.85], [0.1, 0.2, 0.3, 0.2, 0.25]):
        cell = tables.over_seeds(values)
        mean, count = sum(values) / len(values), len(values)
        spread = (sum((v - mean) ** 2 for v in values) / (count - 1) / count) ** 0.5
        low, high = t.interval(0.95, count - 1, loc=mean, scale=spread)
        assert cell["mean"] == pytest.approx(mean, abs=1e-4)
        assert (cell["low"], cell["high"]) == pytest.approx((low, high), abs=1e-3)
    assert tables.over_seeds([0.5])["low"] is None


@pytest.mark.on_demand
def test_a_study_tunes_asks_and_resumes_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(asking.SAMPLINGS, "3.5", (3.5, 2))
    out = tmp_path / "out"
    assert priors.main(["--out", str(out), *OPTIONS, "--center_crop"]) == 0
    shown = capsys.readouterr().out
    assert "guidance 3.5, 2 steps" in shown
    assert "prior_off" in shown
    results = json.loads((out / "results.json").read_text())
    assert len(results["records"]["prior_off"]) == 2
    subject = results["summary"][0]["measures"]["the subject"]
    assert len(subject["base"]["values"]) == 1
    assert len(subject["prior_off"]["values"]) == 2
    settings = json.loads((out / "prior_off-1" / "model" / "hyperparameters.json").read_text())
    assert settings["seed"] == "1"
    assert settings["center_crop"] == "True"  # options that the study does not know go to the job

    written = (out / "prior_off-0" / "model" / "model_index.json").stat().st_mtime_ns
    assert priors.main(["--out", str(out), *OPTIONS, "--center_crop"]) == 0
    assert (out / "prior_off-0" / "model" / "model_index.json").stat().st_mtime_ns == written
    assert json.loads((out / "results.json").read_text())["records"] == results["records"]

    assert priors.main(["--out", str(out), *OPTIONS, "--center_crop", "--seeds", "1"]) == 0
    fewer = json.loads((out / "results.json").read_text())["records"]
    assert fewer["prior_off"] == results["records"]["prior_off"][:1]

    assert priors.main(["--out", str(out), *OPTIONS]) == 1
    assert "other settings" in capsys.readouterr().err


def test_a_fine_tune_that_fails_ends_the_study(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(asking.SAMPLINGS, "3.5", (3.5, 1))
    assert (
        priors.main(["--out", str(tmp_path / "out"), *OPTIONS, "--batch_size", "1", "--epochs=0"])
        == 1
    )
    assert "exit code 1" in capsys.readouterr().err


@pytest.mark.on_demand
def test_prior_prediction_stands_beside_class_images_and_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(asking.SAMPLINGS, "3.5", (3.5, 1))
    out = tmp_path / "out"
    options = (*OPTIONS, "--seeds", "1", "--num_class_images", "1", "--out", str(out))

    def written(condition: str) -> dict[str, str]:
        path = out / f"{condition}-0" / "model" / "hyperparameters.json"
        settings: dict[str, str] = json.loads(path.read_text())
        return settings

    assert priors.main([*options, "--prior", "both"]) == 0
    made = {path.name for path in out.glob("prior_*")}
    assert made == {"prior_off-0", "prior_on-0"}  # the names from before a third condition existed
    assert "prior" not in json.loads((out / "study.json").read_text())
    kept = [out / name / "model" / "model_index.json" for name in sorted(made)]
    times = [path.stat().st_mtime_ns for path in kept]
    capsys.readouterr()

    assert priors.main([*options, "--prior", "all"]) == 0
    assert [path.stat().st_mtime_ns for path in kept] == times
    heads = [line.split() for line in capsys.readouterr().out.splitlines() if "measure" in line]
    assert heads == [["measure", "base", "prior_off", "prior_on", "prior_prediction"]]
    assert written("prior_off")["with_prior_preservation"] == "False"
    assert written("prior_on").get("prior_preservation_mode", "images") == "images"
    assert written("prior_prediction")["prior_preservation_mode"] == "prediction"
    assert (out / "prior_on-0" / "output" / "class_images").is_dir()
    assert not (out / "prior_prediction-0" / "output" / "class_images").exists()


@pytest.mark.parametrize(
    ("word", "conditions"),
    [
        ("off", ("prior_off",)),
        ("on", ("prior_on",)),
        ("prediction", ("prior_prediction",)),
        ("both", ("prior_off", "prior_on")),
        ("all", ("prior_off", "prior_on", "prior_prediction")),
    ],
)
def test_prior_names_the_conditions(word: str, conditions: tuple[str, ...]) -> None:
    plan, _, _ = priors.read_plan(["--out", "out", "--prior", word])
    assert plan.prior == conditions
