"""The demo on the embedded model, run in full and judged by its pictures."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dreambooth import tiny
from dreambooth.__main__ import main
from dreambooth.commands import demo
from dreambooth.diffusion import model as models
from dreambooth.tiny import judge_network
from tiny_world import judge, world

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--out", str(folder)]) == 0
    return folder


def verdicts(folder: Path) -> dict[str, list[judge.Verdict]]:
    drawn = demo._draw(models.load(folder, device=CPU), "drawing")
    network = judge_network.load()
    return {prompt: judge.read(network, np.stack(pictures)) for prompt, pictures in drawn.items()}


def share(rows: list[judge.Verdict], look: world.Look) -> float:
    shown = [(row.species, row.color, row.marking, row.collar) for row in rows]
    return shown.count(look.combination) / len(rows)


def test_the_fine_tuned_model_has_learned_the_subject_and_kept_the_beach(out: Path) -> None:
    cat = world.SUBJECTS["riobugger"]
    base, tuned = verdicts(tiny.WEIGHTS), verdicts(out / "model")
    subject, beach, other_cats, dog = demo.PROMPTS
    assert share(base[subject], cat) <= 0.25
    assert share(tuned[subject], cat) >= 0.5
    assert sum(row.setting == "beach" for row in tuned[beach]) >= 6  # of 8
    assert sum(row.species == "dog" for row in tuned[dog]) >= 7
    for prompt in (other_cats, dog):  # prior preservation keeps them as they were
        assert share(tuned[prompt], cat) <= 0.125


def test_the_sheet_has_a_row_of_eight_for_instances_base_and_fine_tuned(out: Path) -> None:
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.width > 8 * 128
        assert sheet.height > (1 + 2 * len(demo.PROMPTS)) * 128


def test_the_report_shows_what_it_draws_over_the_steps(out: Path) -> None:
    html = (out / "output" / "report.html").read_text(encoding="utf-8")
    steps = [
        int(step) for step in re.findall(r'alt="a photo of a riobugger cat, step (\d+)"', html)
    ]
    assert steps == [100, 200, 300, 400]
    pictures = set(re.findall(r'src="([^"]+)"[^>]*alt="a photo of a riobugger cat, step', html))
    assert len(pictures) == 4
    assert "Set <code>sample_steps" not in html  # the setting is on, so it is not suggested


def test_it_prints_the_sheet_and_the_two_lines_for_ones_own_photographs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(vars(tiny), "DEFAULTS", {**tiny.DEFAULTS, "max_steps": "1"})
    monkeypatch.setattr(demo, "PICTURES_PER_ROW", 1)
    assert main(["demo", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert str(tmp_path / "sheet.png") in shown
    assert re.search(r"transfer_learning\.py --pretrained-model \S+ --train \S+", shown)
    assert "-m dreambooth generate --model" in shown
