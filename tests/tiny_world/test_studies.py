"""The published experiments, in miniature: one seed, two pictures a prompt, five steps."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from tiny_world import answers, asking, clean, fine_tunes, score, stopping, study, tables
from tiny_world.__main__ import main
from tiny_world.judge import Verdict
from tiny_world.studies import data, feats, prior, sequential

MINIATURE = ("--seeds", "1", "--pictures", "2", "--steps", "5")

DOPPLER = Verdict(
    species="dog",
    color="orange",
    marking="patched",
    collar="blue",
    seat="none",
    setting="beach",
    style="photo",
)
PLAIN = replace(DOPPLER, color="black", marking="plain", collar="none")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw pictures in two steps, and let the painter draw few for the measure of clean ones."""
    monkeypatch.setitem(asking.SAMPLINGS, "7.5", (7.5, 2))
    monkeypatch.setattr(clean, "_PAINTED", 10)


def run(name: str, out: Path, *options: str) -> int:
    return main(["study", name, "--out", str(out), *MINIATURE, *options])


def page_for(name: str, folder: Path) -> Path:
    page = folder / "studies.md"
    page.write_text(
        f"# Studies\n\nSo it was.\n\n<!-- study {name} -->\n<!-- /study {name} -->\n\nEnd\n"
    )
    return page


def test_overfitting_fills_its_place_on_a_page_and_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, page = tmp_path / "out", page_for("overfitting", tmp_path)
    assert run("overfitting", out, "--write", str(page)) == 0
    shown = capsys.readouterr().out
    assert "| early_stopping | 5 |" in shown
    assert "| 5 steps | 5 |" in shown
    record = json.loads((out / "seed-0.json").read_text())
    assert set(record["judged"]) == {"5"}
    assert not (out / "seed-0").exists()

    text = page.read_text()
    assert text.startswith("# Studies\n\nSo it was.\n\n<!-- study overfitting -->\n")
    assert text.endswith("<!-- /study overfitting -->\n\nEnd\n")
    command = "python -m tiny_world study overfitting --out out/overfitting"
    assert f"`{command} {' '.join(MINIATURE)}`" in text
    results = json.loads((out / "results.json").read_text())
    assert results["measured"].startswith(date.today().isoformat())
    assert results["table"] in text
    assert results["table"] in shown
    with Image.open(tmp_path / "studies" / "overfitting.png") as sheet:
        assert sheet.width > 4 * 64
    drawn = (tmp_path / "studies" / "overfitting.svg").read_text()
    assert {each.tag.rpartition("}")[2] for each in ElementTree.fromstring(drawn)} >= {
        "svg",
        "text",
    }
    assert "var(" not in drawn  # variables are a page's

    monkeypatch.setattr("tiny_world.fine_tunes.train", None)  # nothing is trained again
    (out / "results.json").write_text(json.dumps({**results, "measured": "2026-01-01, CPU"}))
    page.write_text(text.replace("| steps |", "| spoiled |"))
    assert run("overfitting", out, "--write", str(page)) == 0
    assert page.read_text() == text.replace(results["measured"], "2026-01-01, CPU")


def test_overfitting_trains_and_judges_what_stopping_does() -> None:
    overfitting = study.STUDIES["overfitting"]
    options = "--out out --data dog1_16 --with_prior_preservation True"
    options += " --prior_preservation_mode prediction --training_guidance_scale 1.5"
    plan, _, _ = stopping.read_plan(options.split())
    (tune, *_) = overfitting.fine_tunes(overfitting.scale)
    assert plan.fine_tune(0) == tune
    assert (plan.seeds, plan.pictures) == (overfitting.scale.seeds, overfitting.scale.pictures)
    assert overfitting.questions(tune) == score.questions_on(plan.data.subject)
    assert overfitting.chosen(tune, []) == stopping.chosen([], plan.steps)


def test_a_page_without_a_place_and_a_folder_of_other_settings_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "study.json").write_text("{}\n")
    assert run("overfitting", tmp_path) == 1
    assert "other settings" in capsys.readouterr().err
    assert run("overfitting", tmp_path / "study.json") == 1
    assert "cannot be created" in capsys.readouterr().err
    assert run("overfitting", tmp_path / "new", "--write", str(tmp_path / "no.md")) == 1
    assert "<!-- study overfitting -->" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_steps_without_a_kept_state_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("overfitting", tmp_path, "--steps", "120") == 1
    assert "multiple" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "module", "fewer", "rows"),
    [
        (
            "sequential",
            sequential,
            {
                "CHAINS": {("cat", "dog1_8"): "the cat, then dog 1"},
                "WAYS": sequential.WAYS[-1:],
            },
            ["the cat, then dog 1: as the demo trains, with keep_subjects"],
        ),
        (
            "prior",
            prior,
            {"WAYS": {"prior_prediction": "prediction"}},
            ["prediction | 5"],
        ),
        ("data", data, {"PICTURES": (4,), "RATES": ("3e-4",)}, ["4 | 3e-4"]),
        (
            "feats",
            feats,
            {"ASKED": {"chair": feats.ASKED["chair"]}},
            ['"a photo of a vorbit chair in red" | the chair, and red'],
        ),
    ],
    ids=("sequential", "prior", "data", "feats"),
)
def test_a_study_of_a_part_of_its_fine_tunes(
    name: str,
    module: ModuleType,
    fewer: dict[str, object],
    rows: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for constant, value in fewer.items():
        monkeypatch.setattr(module, constant, value)
    assert_a_section(name, tmp_path, rows)


@pytest.mark.on_demand
@pytest.mark.parametrize("name", study.STUDIES)
def test_a_whole_study(name: str, tmp_path: Path) -> None:
    assert_a_section(name, tmp_path, [])


def assert_a_section(name: str, out: Path, rows: list[str]) -> None:
    """Assert that a study writes its part of a page, with these beginnings of rows."""
    assert run(name, out) == 0
    text = (out / "section.md").read_text()
    assert f"study {name} --out out/{name} {' '.join(MINIATURE)}`" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert all(any(line.startswith(f"| {row} |") for line in table) for row in rows)
    for picture in re.findall(r"\]\(([^)]+)\)", text):
        assert (out / picture).stat().st_size > 1000
    models = [path.parent for path in out.rglob("model_index.json")]
    assert models == []  # only records and pictures are kept


def test_the_drawings_of_one_subject_are_not_taken_for_anothers(tmp_path: Path) -> None:
    tune = sequential._second_run(("dog1_8", "dog2_4"), sequential.WAYS[0], 0, 5)
    assert tune.base is not None
    assert (tune.base.name, tune.name) == ("plain-dog1_8-0", "off-dog1_8-dog2_4-0")
    asked = sequential.Sequential().questions(tune)
    dogs = {"a photo of a Doppler dog": DOPPLER, "a photo of a zwx dog": DOPPLER}
    verdicts = {prompt: [dogs.get(prompt, PLAIN)] for prompt in asked.prompts}
    black = np.zeros((1, 64, 64, 3), dtype=np.uint8)
    interview = asking.Interview(
        questions=asked,
        pictures=dict.fromkeys(asked.prompts, black),
        verdicts=verdicts,
        answers=answers.count(asked, verdicts),
        seconds=1.0,
    )
    critic = clean.Critic.of_the_world()
    found = sequential.Sequential().measure(tune, interview, critic)
    assert (found["earlier subject"], found["earlier as new"]) == (1.0, 0.0)
    assert (found["new subject"], found["new as earlier"]) == (0.0, 1.0)
    assert (found["earlier class kept"], found["new class kept"]) == (1.0, 1.0)


def test_ways_are_compared_where_the_subject_first_reaches_enough() -> None:
    def record(**shares: float) -> dict[str, object]:
        judged = {step[1:]: {"subject": share} for step, share in shares.items()}
        return {"judged": judged}

    assert prior.equal_step(record(s50=0.2, s100=0.9, s200=1.0)) == 100
    assert prior.equal_step(record(s50=0.2, s100=0.8, s200=0.7)) == 100  # none reaches it


def test_a_cell_says_how_seeds_differ() -> None:
    assert tables.cell([0.5]) == ".50"
    assert tables.cell([0.5, 1.0]) == ".75 (.50, 1.00)"
    assert tables.cell([0.9, 0.95, 1.0]) == ".95 (.83 to 1.00)"
    assert tables.cell([2.0, 2.1, 2.2], most=float("inf")) == "2.10 (1.85 to 2.35)"


def test_pictures_of_a_state_are_found_again(tmp_path: Path) -> None:
    grey = {
        prompt: np.full((6, 64, 64, 3), level, dtype=np.uint8)
        for prompt, level in (("first", 10), ("second", 200))
    }
    grey["second"][1] = 90
    fine_tunes.keep_pictures(tmp_path, "cat-0", 50, grey)
    kept = fine_tunes.kept_pictures(tmp_path, "cat-0", 50, row=1)
    assert [picture.getpixel((0, 0))[0] for picture in kept] == [200, 90, 200, 200]
