"""Reading metrics.jsonl and the meter's pictures back."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from dreambooth.report import report_data

ROW = {
    "step": 1,
    "epoch": 0.5,
    "loss": 0.3,
    "instance_loss": 0.2,
    "class_loss": None,
    "learning_rate": 2e-06,
    "grad_norm": 1.5,
    "steps_per_second": 4.0,
    "time": 1.0,
}


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    more = {**ROW, "step": 2, "class_loss": 0.1, "steps_per_second": 0.0, "grad_norm": math.inf}
    path.write_text(json.dumps(ROW) + "\n" + json.dumps(more) + "\n")
    first, second = report_data.read_metrics(path)
    assert (first.step, first.instance_loss, first.class_loss) == (1, 0.2, None)
    assert first.loss == 0.3
    assert first.seconds == 0.25
    assert second.class_loss == 0.1
    assert second.seconds is None  # the step is too slow for the digits that are kept
    assert math.isinf(second.grad_norm)


def test_lines_that_are_no_rows_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = json.dumps(ROW).encode()
    path.write_bytes(b"\n".join([whole, b"[]", b"{}", b"\xff\xfe", b"null", whole[:20]]))
    assert len(report_data.read_metrics(path)) == 1


def test_without_a_file_there_are_no_rows(tmp_path: Path) -> None:
    assert report_data.read_metrics(tmp_path / "metrics.jsonl") == []


def test_the_meters_pictures_come_by_step_and_prompt(tmp_path: Path) -> None:
    names = ["subject", "place", "subject_2", "place_2", "class", "class_2", "other_class"]
    odd = ["step-000020-sheet.png", "step-000020-subject.jpg", "step-20-subject.png", "scores.json"]
    for name in [
        *odd,
        *(f"step-{step}-{name}.png" for step in ("000020", "000000") for name in names),
    ]:
        (tmp_path / name).write_bytes(b"")
    found = report_data.meter_pictures(tmp_path)
    assert [(one.step, one.name) for one in found] == [
        (step, name) for step in (0, 20) for name in names
    ]
    assert found[0].path == tmp_path / "step-000000-subject.png"
    assert report_data.meter_pictures(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ('{"20": {"clean": 1, "class_kept": 0.5}}', {20: {"clean": 1.0, "class_kept": 0.5}}),
        ('{"20": {}}', {20: {}}),
        *((text, {}) for text in ("", "[]", "{", '{"x": {}}', '{"1": 2}', '{"1": {"a": NaN}}')),
        ("[" * 100_000, {}),
    ],
)
def test_scores_come_back_or_there_are_none(
    tmp_path: Path, text: str, scores: dict[int, dict[str, float]]
) -> None:
    assert report_data.meter_scores(tmp_path) == {}
    (tmp_path / "scores.json").write_text(text)
    assert report_data.meter_scores(tmp_path) == scores
    if len(scores.get(20, {})) == 2:
        assert report_data.in_words(scores[20]) == "clean 1.00, class kept 0.50"
