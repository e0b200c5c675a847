from __future__ import annotations

import json

import pytest

from benchmarks import startup
from benchmarks.__main__ import parser


def test_every_moment_comes_and_the_last_line_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert startup.main(parser().parse_args(["startup", "--starts", "1"])) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    seconds = summary["seconds"]
    assert 0 < seconds["hyperparameters printed"] < seconds["plan printed"]
    assert seconds["plan printed"] < seconds["first step made"]
    assert seconds["server ready"] > 0
