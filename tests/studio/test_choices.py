"""The states of a run are drawn with once each, and one is made the model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dreambooth.errors import UserError
from dreambooth.runs import run_states
from dreambooth.runs.run_list import RunList
from dreambooth.studio.choices import Choices, reading_at
from dreambooth.studio.drawings import Drawing, keeping
from dreambooth.studio.own_process import OwnProcess

Started = list[list[str]]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    """Let processes be those of a stand-in that draws at once; return their arguments."""
    found: Started = []

    def start(process: OwnProcess, *arguments: str, then: Callable[[], None] | None = None) -> None:
        found.append([*arguments])
        (process.folder / "process.json").write_text("{}")
        if arguments[0] == "generate":
            prompts = [one for one in arguments if one.startswith("--prompt=")]
            for number in range(len(prompts)):
                (process.folder / f"{number:03}_x_seed{7 + number}.png").write_bytes(b"")

    monkeypatch.setattr(OwnProcess, "start", start)
    return found


@pytest.fixture
def choices(tmp_path: Path) -> Choices:
    """Return the choice of a run with the states of three steps, of which 30 is the model."""
    runs = RunList(tmp_path)
    run = runs.new_draft({}, name="dog")
    pictures = run.folder / "pictures"
    pictures.mkdir()
    info = {"instance_prompt": "a photo of a riobugger dog", "class_prompt": "a photo of a dog"}
    (pictures / "dataset_info.json").write_text(json.dumps(info))
    run.write_settings({"train": str(pictures), "pretrained_model": "tiny"})
    (run.folder / "exit_code").write_text("0")
    (run.folder / "model" / "unet").mkdir(parents=True)
    (run.folder / "model" / "model_index.json").write_text("{}")
    (run.folder / "model" / "__model_info__.json").write_text(json.dumps({"steps": 30}))
    (run.folder / "model" / "unet" / "diffusion_pytorch_model.safetensors").write_text("30")
    for step in (10, 20):
        folder = run.folder / "checkpoints" / "states" / f"step-{step:08}"
        folder.mkdir(parents=True)
        (folder / "unet.safetensors").write_text(str(step))
    return Choices(runs, run)


def advanced(choices: Choices, times: int = 3) -> list[Drawing]:
    for _ in range(times):
        choices.drawings.advance()
    return choices.drawings.all()[::-1]


def test_each_state_is_drawn_with_once(choices: Choices, started: Started) -> None:
    ten, twenty, thirty = choices.states()
    assert [state.step for state in (ten, twenty, thirty)] == [10, 20, 30]
    assert choices.model_step() == 30
    assert choices.drawn(ten) is None
    choices.draw(ten)
    drawings = advanced(choices)
    model = choices.run.folder / "model"
    wanted = [(f"--model={model}", "--state=10"), (f"--model={model}", "--state=30")]
    assert [tuple(arguments[1:3]) for arguments in started[:2]] == wanted
    assert started[2][1] == "--model=tiny"
    prompts = [
        *("a photo of a riobugger dog", "a photo of a riobugger dog on a beach"),
        *("a photo of a dog", "a photo of a cat"),
    ]
    for arguments in started:
        assert [one for one in arguments if "prompt" in one] == [f"--prompt={p}" for p in prompts]
        assert "--seed=7" in arguments
    assert [choices.drawn(state) for state in (ten, thirty, None)] == drawings
    assert all(one.is_of_a_run for one in drawings)
    choices.draw(ten)
    choices.draw(twenty)
    assert len(advanced(choices)) == len(started) == 4
    # A state with other weights is another one, and what cannot be shown any more goes.
    os.utime(ten.weights["unet"], ns=(1, 1))
    changed = choices.states()[0]
    assert choices.drawn(changed) is None
    choices.draw(changed)
    assert len(started) == 5
    assert len(advanced(choices)) == 4
    # So does what was cancelled before it was whole.
    drawn = choices.drawn(twenty)
    assert drawn is not None
    drawn.pictures()[0].unlink()
    choices.draw(twenty)
    assert len(started) == 6
    assert len(advanced(choices)) == 4


def test_what_was_drawn_is_scored_once_nothing_is_drawn(choices: Choices, started: Started) -> None:
    ten = choices.states()[0]
    choices.draw(ten)
    choices.advance()
    assert [one[0] for one in started] == ["generate"] * 2
    for _ in range(5):
        choices.advance()
    assert [one[0] for one in started] == ["generate"] * 3 + ["evaluate"] * 2
    drawn, base = choices.drawn(ten), choices.drawn(None)
    assert drawn is not None
    assert base is not None
    said = next(one for one in started if f"--drawn={drawn.folder}" in one)
    assert {f"--base_drawn={base.folder}", "--base=tiny", "--other_prompt=a photo of a cat"} <= {
        *said
    }
    assert choices.scores(drawn) == {}
    found = {"measures": {"subject": {"mean": 0.5}, "x": {"mean": "1"}, "y": 3}}
    (drawn.folder / "scores" / "evaluation.json").write_text(json.dumps(found))
    assert choices.scores(drawn) == {"subject": 0.5}
    assert drawn.pictures()[0].parent == drawn.folder


def test_what_a_deleted_run_has_drawn_goes(choices: Choices, started: Started) -> None:
    choices.draw(choices.states()[0])
    advanced(choices)
    kept = choices.runs.again(choices.run, {}, name="other")
    choices.runs.delete(choices.run)
    choices.drawings.compare(kept, ["a dog"], {})
    asked = [one.request() for one in choices.drawings.all()]
    assert [one["compared"] for one in asked] == [kept.name] * 2
    assert len(started) == 4


def test_a_state_is_kept_by_the_command_unless_the_model_is_in_use(
    choices: Choices, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    ten = choices.states()[0]
    with monkeypatch.context() as patch:
        patch.setattr(Drawing, "is_drawing", True)
        choices.drawings.add({"model": "state 10 of run 0001-dog"}, ["a dog"])
        with pytest.raises(UserError, match="Pictures are being drawn with the model of 0001-dog"):
            choices.keep(ten)
    server = choices.runs.folder / ".server"
    server.mkdir()
    (server / "served.json").write_text('{"run": "0001-dog"}')
    with monkeypatch.context() as patch:
        patch.setattr(OwnProcess, "is_running", True)
        with pytest.raises(UserError, match="is being served: stop the server first"):
            choices.keep(ten)
    assert started == []
    choices.keep(ten)
    folder = f"--dir={choices.runs.folder}"
    assert started == [["runs", "keep", folder, "--", "0001-dog", "10"]]
    shutil.rmtree(server)
    with monkeypatch.context() as patch:
        patch.setattr(OwnProcess, "is_running", True)
        patch.setattr(Drawing, "is_drawing", False)
        with pytest.raises(UserError, match="Another state is being made the model"):
            choices.keep(ten)
        choices.drawings.advance()  # nothing is drawn with a model that is replaced
    assert len(started) == 1
    assert keeping(choices.run).folder.parent == choices.run.folder
    choices.drawings.advance()
    assert started[-1][0] == "generate"


def test_a_comparison_of_an_earlier_model_is_none(choices: Choices, started: Started) -> None:
    choices.drawings.compare(choices.run, ["a dog"], {})
    assert len(choices.drawings.comparison(choices.run)) == 2
    model = run_states.model_state(choices.run)
    assert model is not None
    os.utime(model.weights["unet"], ns=(1, 1))
    assert choices.drawings.comparison(choices.run) == []
    advanced(choices)
    choices.drawings.compare(choices.run, ["a dog"], {})
    assert len(choices.drawings.all()) == 2
    assert started


def test_the_numbers_of_a_state_are_those_of_the_last_reading_before(choices: Choices) -> None:
    lines: list[dict[str, object]] = [
        {"step": 9, "meter": {"loss": 0.5}},
        {"step": 10},
        {"step": 20, "meter": {"loss": 0.4}},
    ]
    rest: dict[str, object] = {
        "loss": 1,
        "instance_loss": 1,
        "class_loss": None,
        "learning_rate": 1,
        "grad_norm": 1,
    }
    text = "".join(json.dumps({**rest, **line}) + "\n" for line in lines)
    (choices.run.folder / "metrics.jsonl").write_text(text)
    found = choices.readings()
    assert [reading_at(found, step) for step in (5, 10, 20, 30)] == [
        *(None, (9, {"loss": 0.5}), (20, {"loss": 0.4}), (20, {"loss": 0.4})),
    ]
