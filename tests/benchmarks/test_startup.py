from __future__ import annotations

import json

import pytest

from benchmarks import startup
from benchmarks.__main__ import parser


def test_the_table_is_timed_in_a_process_of_its_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = {"expected memory": 2.0, "training: 1/1": 3.0}
    monkeypatch.setattr(startup.Product, "training_says", lambda _, sign: waits[sign])
    monkeypatch.setattr(startup.Product, "server_ready", lambda _: 4.0)
    assert startup.main(parser().parse_args(["startup", "--starts", "2"])) == 0
    seconds = json.loads(capsys.readouterr().out.splitlines()[-1])["seconds"]
    assert seconds.pop("hyperparameters printed") > 0
    assert seconds == {"plan printed": 2.0, "first step made": 3.0, "server ready": 4.0}


@pytest.mark.on_demand
def test_every_moment_comes_and_the_last_line_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert startup.main(parser().parse_args(["startup", "--starts", "1"])) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    seconds = summary["seconds"]
    assert 0 < seconds["hyperparameters printed"] < seconds["plan printed"]
    assert seconds["plan printed"] < seconds["first step made"]
    assert seconds["server ready"] > 0
