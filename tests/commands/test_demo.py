"""The demo on the embedded model, run in full and judged by its pictures."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dreambooth import tiny
from dreambooth.__main__ import main
from dreambooth.commands import demo, evaluate
from dreambooth.tiny import judge_network
from tiny_world import judge, world

Verdicts = dict[str, list[judge.Verdict]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """What one run wrote and printed, and what the judge reads in the pictures that it drew."""

    out: Path
    printed: str
    base: Verdicts
    tuned: Verdicts


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """Run the demo once; of the base model, only the pictures that a test reads are drawn."""
    out = tmp_path_factory.mktemp("demo")
    drawn: list[dict[str, list[np.ndarray]]] = []
    draw = evaluate.draw

    def kept(model: Any, prompts: Sequence[str], *more: Any, **options: Any) -> Any:
        assert prompts == demo.PROMPTS
        is_base = not drawn
        assert (model.folder == tiny.WEIGHTS) is is_base
        drawn.append(draw(model, prompts[:1] if is_base else prompts, *more, **options))
        return dict.fromkeys(prompts, drawn[0][prompts[0]]) if is_base else drawn[-1]

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as stdout:
        patch.setattr(evaluate, "draw", kept)
        patch.setattr("dreambooth.training.plan.SCORED_STEPS", 5)  # for the meter's pictures
        assert main(["demo", "--out", str(out)]) == 0
    network = judge_network.load()
    base, tuned = (
        {prompt: judge.read(network, np.stack(pictures)) for prompt, pictures in rows.items()}
        for rows in drawn
    )
    return Demo(out=out, printed=stdout.getvalue(), base=base, tuned=tuned)


def share(rows: list[judge.Verdict], look: world.Look) -> float:
    shown = [(row.species, row.color, row.marking, row.collar) for row in rows]
    return shown.count(look.combination) / len(rows)


def test_the_fine_tuned_model_has_learned_the_subject_and_kept_the_beach(ran: Demo) -> None:
    cat = world.SUBJECTS["riobugger"]
    base, tuned = ran.base, ran.tuned
    subject, beach, other_cats, dog = demo.PROMPTS
    assert share(base[subject], cat) <= 0.25
    assert share(tuned[subject], cat) >= 0.5
    assert sum(row.setting == "beach" for row in tuned[beach]) >= 6  # of 8
    assert sum(row.species == "dog" for row in tuned[dog]) >= 7
    for prompt in (other_cats, dog):  # prior preservation keeps them as they were
        assert share(tuned[prompt], cat) <= 0.125


def test_the_sheet_has_a_row_of_eight_for_instances_base_and_fine_tuned(ran: Demo) -> None:
    with Image.open(ran.out / "sheet.png") as sheet:
        assert sheet.width > 8 * 128
        assert sheet.height > (1 + 2 * len(demo.PROMPTS)) * 128


def test_the_report_shows_what_it_draws_over_the_steps(ran: Demo) -> None:
    html = (ran.out / "output" / "report.html").read_text(encoding="utf-8")
    steps = [
        int(step) for step in re.findall(r'alt="a photo of a riobugger cat, step (\d+)"', html)
    ]
    kept = json.loads((ran.out / "model" / "__model_info__.json").read_text())["steps"]
    assert 400 < kept <= 800
    assert steps[:4] == [100, 200, 300, 400]
    assert kept in steps
    pictures = set(re.findall(r'src="([^"]+)"[^>]*alt="a photo of a riobugger cat, step', html))
    assert len(pictures) == len(steps)
    assert "Set <code>sample_steps" not in html  # the setting is on, so it is not suggested
    first, turned, last = (int(step) for step in re.findall(r"<h3[^>]*>Step (\d+)", html))
    assert (first, last) == (0, kept)
    assert 0 < turned < kept


def test_it_prints_the_sheet_and_the_two_lines_for_ones_own_photographs(ran: Demo) -> None:
    assert str(ran.out / "sheet.png") in ran.printed
    assert re.search(r"transfer_learning\.py --pretrained-model \S+ --train \S+", ran.printed)
    assert "-m dreambooth generate --model" in ran.printed
