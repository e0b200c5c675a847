"""What a run says of its model, and the states from which another one can be chosen."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dreambooth.errors import UserError
from dreambooth.runs import run_states
from dreambooth.runs.run_folder import Run
from dreambooth.runs.run_status import RunStatus

REASON = "Stopped at step 30 of 40: pictures burn; the model is that of step 20."


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Return a run that is done, with a model whose own `info` a test writes."""
    (tmp_path / "settings.json").write_text("{}")
    (tmp_path / "exit_code").write_text("0")
    (tmp_path / "model" / "unet").mkdir(parents=True)
    (tmp_path / "model" / "model_index.json").write_text("{}")
    (tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors").write_text("")
    return Run(tmp_path)


def tell(run: Run, info: object) -> None:
    (run.folder / "model" / "__model_info__.json").write_text(json.dumps(info))


def test_the_sentence_of_a_run_says_why_it_ended_early_and_what_was_chosen(run: Run) -> None:
    said = {"ended_early": REASON, "is_chosen": False}
    tell(run, {"steps": 20, "training": said})
    assert RunStatus.of(run).sentence == f"It is done. {REASON}"
    assert RunStatus.of(run).as_json()["ended_early"] == REASON
    tell(run, {"steps": 10, "training": {**said, "is_chosen": True}})
    chosen = "Since then the state of step 10 was chosen as its model."
    assert RunStatus.of(run).sentence == f"It is done. {REASON} {chosen}"
    (run.folder / "exit_code").write_text("143")
    assert RunStatus.of(run).sentence.endswith(f"it begins anew. {chosen}")
    tell(run, {"steps": 40, "training": {"ended_early": None, "is_chosen": False}})
    (run.folder / "exit_code").write_text("0")
    assert RunStatus.of(run).sentence == "It is done."


@pytest.mark.parametrize(
    "info",
    [
        *([], {}, {"steps": "20"}, {"steps": 1.5, "training": []}, {"steps": None}),
        {"training": {"is_chosen": "yes", "ended_early": ""}},
    ],
)
def test_a_model_that_says_something_else_says_nothing(run: Run, info: object) -> None:
    tell(run, info)
    assert RunStatus.of(run).sentence == "It is done."
    assert run_states.states_of(run) == []


def test_a_strangers_reason_is_one_line(run: Run) -> None:
    tell(run, {"steps": 20, "training": {"ended_early": "\x1b[2J\n" + "x" * 9_000}})
    sentence = RunStatus.of(run).sentence
    assert sentence.isprintable()
    assert len(sentence) < 600


def test_each_step_is_a_state_once_and_the_better_weights_are_taken(run: Run) -> None:
    checkpoints = run.folder / "checkpoints"
    for folder in ("states/step-00000010", "states/step-00000020", "step-00000020"):
        (checkpoints / folder).mkdir(parents=True)
        (checkpoints / folder / "unet.safetensors").write_text("")
    (checkpoints / "step-00000030").mkdir()  # without weights
    for info, of_20 in (
        ({"steps": 20}, run.folder / "model"),
        ({"steps": 20, "training": {"is_chosen": True}}, checkpoints / "step-00000020"),
        ({"steps": 20, "training": {"ended_early": REASON}}, checkpoints / "step-00000020"),
    ):
        tell(run, info)
        ten, twenty = run_states.states_of(run)
        assert (ten.step, twenty.step) == (10, 20)
        assert twenty.weights["unet"].is_relative_to(of_20)
    tell(run, {"steps": 40, "training": {"is_chosen": True}})  # its state was deleted
    assert [state.step for state in run_states.states_of(run)] == [10, 20, 40]
    with pytest.raises(UserError, match=r"no state of step 5; it has kept those of the steps 10, "):
        run_states.state_of(run, 5)


def test_no_link_is_followed(run: Run, tmp_path: Path) -> None:
    tell(run, {"steps": 40})
    elsewhere = tmp_path / "elsewhere" / "step-00000010"
    elsewhere.mkdir(parents=True)
    (elsewhere / "unet.safetensors").write_text("")
    (run.folder / "checkpoints").mkdir()
    os.symlink(elsewhere.parent, run.folder / "checkpoints" / "states")
    os.symlink(elsewhere, run.folder / "checkpoints" / "step-00000010")
    assert [state.step for state in run_states.states_of(run)] == [40]
    weights = run.folder / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    os.symlink(elsewhere / "unet.safetensors", weights)
    assert run_states.states_of(run) == []
