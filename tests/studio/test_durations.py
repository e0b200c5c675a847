from __future__ import annotations

import asyncio
import json
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from dreambooth.errors import UserError
from dreambooth.process.identity import ProcessIdentity
from dreambooth.runs.run_folder import Run
from dreambooth.runs.run_list import RunList
from dreambooth.settings.hyperparameters import KNOBS
from dreambooth.studio import drafts, durations
from dreambooth.tiny import DATA


@pytest.fixture
def runs(tmp_path: Path) -> RunList:
    return RunList(tmp_path / "runs")


@pytest.fixture
def draft(runs: RunList) -> Run:
    run = runs.new_draft(drafts.contents_at_first(None))
    (run.folder / "pictures").mkdir()
    for path in (DATA / "cat").glob("*.png"):
        shutil.copy(path, run.folder / "pictures")
    return run


def trained(runs: RunList, seconds: float, *, host: str = "", **settings: object) -> Run:
    """Make what a run that took so long for each step leaves."""
    run = runs.new_draft({}, name="cat")
    run.write_settings({"train": "pictures", **settings})
    identity = ProcessIdentity(
        pid=1, start_time="1", boot_id="x", host=host or socket.gethostname()
    )
    (run.folder / "process.json").write_text(json.dumps({**identity.as_json(), "begun_at": 5.0}))
    row = {"epoch": 1, "loss": 1, "instance_loss": 1, "class_loss": None}
    row |= {"learning_rate": 1, "grad_norm": 1}
    lines = [
        json.dumps({**row, "step": step, "steps_per_second": 1 / (seconds if step else 50)})
        for step in range(6)
    ]
    (run.folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return run


def test_the_settings_that_change_no_time_are_settings() -> None:
    assert {knob.name for knob in KNOBS} > durations.SPEEDLESS


def test_a_run_like_it_says_how_long_it_takes(runs: RunList) -> None:
    assert durations.known(runs, {"pretrained_model": "tiny"}) is None
    trained(runs, 2.0, pretrained_model="tiny", max_steps="7", seed="5")
    found = durations.known(runs, {"pretrained_model": '"tiny"', "train": "/x", "batch_size": "1"})
    assert found is not None
    assert found.seconds == pytest.approx(2.0)
    assert found.sentence(60).startswith(
        "about 2 minutes for 60 steps at 2 s, as those of the run 0001-cat on this machine."
    )
    assert replace(found, seconds=0.2).sentence(60).startswith("about 12 seconds")
    assert replace(found, seconds=300).sentence(60).startswith("about 5.0 hours")


@pytest.mark.parametrize(
    "settings",
    [
        *({}, {"pretrained_model": "tiny", "batch_size": "2"}, {"pretrained_model": "/elsewhere"}),
        *({"pretrained_model": "tiny", "train_text_encoder": "True"}, {"max_steps": "many"}),
    ],
)
def test_a_job_that_differs_says_nothing(runs: RunList, settings: dict[str, object]) -> None:
    trained(runs, 2.0, pretrained_model="tiny")
    assert durations.known(runs, settings) is None


def test_another_machines_run_says_nothing(runs: RunList) -> None:
    trained(runs, 2.0, pretrained_model="tiny", host="elsewhere")
    assert durations.known(runs, {"pretrained_model": "tiny"}) is None


def test_a_measurement_takes_a_few_steps_and_leaves_little(runs: RunList, draft: Run) -> None:
    settings = drafts.prepare(draft)
    asyncio.run(durations.measure(runs, draft, settings))
    found = durations.known(runs, settings)
    assert found is not None
    assert 0 < found.seconds < 60
    assert "measured with 5 steps of this job" in found.basis
    left = {path.name for path in (runs.folder / durations.FOLDER / draft.name).iterdir()}
    assert left == {"settings.json", "metrics.jsonl", "process.json"}
    assert [run.name for run in runs.runs()] == [draft.name]


def test_a_job_that_fails_says_why(runs: RunList, draft: Run) -> None:
    settings = {**drafts.prepare(draft), "pretrained_model": "/nowhere"}
    with pytest.raises(UserError, match="There is no model at /nowhere"):
        asyncio.run(durations.measure(runs, draft, settings))
    assert durations.known(runs, settings) is None
