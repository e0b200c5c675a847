"""Reading metrics.jsonl back."""

from __future__ import annotations

import json
import math
from pathlib import Path

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
