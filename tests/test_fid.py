"""compute_fid through the real job: the score falls when the subject is learned."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dreambooth import job, tiny


def fid_score(
    out: Path, capsys: pytest.CaptureFixture[str], *, steps: int, learning_rate: float
) -> float:
    code = job.run(
        [
            *("--pretrained-model", "tiny", "--train", str(tiny.DATA / "cat")),
            *("--model_dir", str(out), "--max_steps", str(steps)),
            *("--learning_rate", str(learning_rate), "--compute_fid", "True"),
        ],
        {},
    )
    shown = capsys.readouterr().err
    assert code == 0, shown
    assert "the judge of the embedded world" in shown
    (score,) = re.findall(r"fid_score=([0-9.]+)$", shown, re.MULTILINE)
    return float(score)


def test_the_score_falls_when_the_subject_is_learned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unlearned = fid_score(tmp_path / "unlearned", capsys, steps=1, learning_rate=1e-9)
    learned = fid_score(tmp_path / "learned", capsys, steps=100, learning_rate=2e-4)
    assert 0 < learned < 0.6 * unlearned
