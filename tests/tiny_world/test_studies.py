"""The published experiments, in miniature: one seed, two pictures a prompt, five steps."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import pytest
from PIL import Image

from dreambooth.errors import UserError
from tiny_world import asking, clean, study
from tiny_world.__main__ import main
from tiny_world.studies import frame

MINIATURE = ("--seeds", "1", "--pictures", "2", "--steps", "5")


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
    assert date.today().isoformat() in text
    results = json.loads((out / "results.json").read_text())
    assert results["table"] in text
    assert results["table"] in shown
    with Image.open(tmp_path / "studies" / "overfitting.png") as sheet:
        assert sheet.width > 4 * 64
    assert "<svg" in (tmp_path / "studies" / "overfitting.svg").read_text()

    monkeypatch.setattr("tiny_world.fine_tunes.train", None)  # nothing is trained again
    (out / "results.json").write_text(json.dumps({**results, "measured": "2026-01-01"}))
    page.write_text(text.replace("embedded model", "another"))
    assert run("overfitting", out, "--write", str(page)) == 0
    assert page.read_text() == text.replace(date.today().isoformat(), "2026-01-01")


def test_a_page_without_a_place_and_a_folder_of_other_settings_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "study.json").write_text("{}\n")
    assert run("overfitting", tmp_path) == 1
    assert "other settings" in capsys.readouterr().err
    found = frame.Findings(table="", sheet=Image.new("RGB", (1, 1)), sheet_says="")
    overfitting = study.STUDIES["overfitting"]
    with pytest.raises(UserError, match="<!-- study overfitting -->"):
        frame.put_on_page(overfitting, overfitting.scale, found, tmp_path, tmp_path / "no.md")


def test_steps_without_a_kept_state_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("overfitting", tmp_path, "--steps", "120") == 1
    assert "multiple" in capsys.readouterr().err
