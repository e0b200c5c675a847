"""A state that a run has kept is drawn with, and becomes the run's model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from dreambooth.__main__ import main
from dreambooth.errors import ModelArtifactError, ResourceError, UserError
from dreambooth.job import chosen_state
from dreambooth.job.kept_states import too_many
from dreambooth.job.run import run_job
from dreambooth.process import files
from dreambooth.runs import run_states
from dreambooth.runs.run_folder import Run
from dreambooth.runs.run_status import RunStatus
from dreambooth.training import meter

Start = Callable[..., Run]


@pytest.fixture
def start(small_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Return a function that trains three steps, each with a reading, in a run's folder."""
    monkeypatch.setattr(meter, "reading_interval", lambda plan, settings: 1)
    generator = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for number in range(2):
        pixels = generator.integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / f"{number}.png")
    info = {"instance_prompt": "a photo of riobugger cat", "class_prompt": "a photo of cat"}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))

    def run(name: str, *options: str) -> Run:
        argv = [f"--pretrained-model={small_model_folder}", f"--train={tmp_path / 'data'}"]
        argv += [f"--run_dir={tmp_path / name}", "--learning_rate=0.001", "--max_steps=3"]
        assert run_job([*argv, *options], {"SAGEMAKER_BASE_DIR": str(tmp_path / "none")}) == 0
        return Run(tmp_path / name)

    return run


def contents(folder: Path) -> dict[str, Any]:
    """Return the files of a model; of weights the tensors, of the card nothing."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            found |= {f"{name}: {key}": v.tobytes() for key, v in load_file(path).items()}
        elif path.is_file() and name not in ("README.md", "__model_info__.json"):
            found[name] = path.read_bytes()
    return found


def steps_of(run: Run) -> list[int]:
    return [state.step for state in run_states.states_of(run)]


def test_the_model_becomes_that_of_a_state_and_goes_back(start: Start, tmp_path: Path) -> None:
    run = start("run", "--keep_states=4", "--train_text_encoder", "--export_single_file")
    shorter = start("shorter", "--max_steps=2", "--train_text_encoder")
    assert steps_of(run) == [1, 2, 3]
    model, info = run.folder / "model", "__model_info__.json"
    last, one_file = contents(model), (run.folder / "model.safetensors").read_bytes()
    (model / "code").mkdir()
    (model / "code" / "inference.py").write_text("mine")
    assert "chosen" not in (model / "README.md").read_text()

    chosen_state.keep(run, 2)
    two = contents(model)
    assert two.pop("code/inference.py") == b"mine"
    assert {name for name in last if not name.startswith("samples/")} == two.keys()
    wanted = contents(shorter.folder / "model")
    for name in ("unet", "text_encoder"):  # as early stopping would have taken it: in fp16
        (path,) = (model / name).glob("*.safetensors")
        whole = load_file(shorter.folder / "model" / name / path.name)
        for key, value in load_file(path).items():
            assert value.dtype == np.float32
            assert np.array_equal(value, whole[key].astype(np.float16).astype(np.float32)), key
    for name in two:
        if not name.startswith(("unet/diff", "text_encoder/model", "hyperparameters")):
            assert two[name] == wanted[name], name
    said = json.loads((model / info).read_text())
    assert (said["steps"], said["training"]["is_chosen"]) == (2, True)
    assert "- Steps: 2. This state of the run was chosen.\n" in (model / "README.md").read_text()
    assert "Partial" not in (model / "README.md").read_text()
    assert (run.folder / "model.safetensors").read_bytes() != one_file
    assert RunStatus.of(run).sentence == (
        "It is done. Since then the state of step 2 was chosen as its model."
    )
    assert [path.name for path in run.folder.glob("dreambooth-*")] == []

    assert main(["runs", "keep", "run", "3", "--dir", str(tmp_path)]) == 0
    again = contents(model)
    del again["code/inference.py"]
    assert again == {name: last[name] for name in again}
    assert (run.folder / "model.safetensors").read_bytes() == one_file
    assert steps_of(run) == [1, 2, 3]
    with pytest.raises(UserError, match="is that of step 3 already"):
        chosen_state.keep(run, 3)
    with pytest.raises(UserError, match="no state of step 7; it has kept those of the steps 1, 2"):
        chosen_state.keep(run, 7)


def test_the_state_of_early_stopping_is_what_would_be_chosen(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dreambooth.job.metering.fault", lambda reading, _: None)
    monkeypatch.setattr("dreambooth.training.early_stopping.GUIDANCE_LIMIT", 0.0)
    monkeypatch.setattr("dreambooth.training.early_stopping.IN_A_ROW", 2)
    ended = start("ended", "--early_stopping", "--keep_states=3", "--export_precision=fp16")
    assert steps_of(ended) == [1, 2]
    status = RunStatus.of(ended)
    assert status.sentence.startswith("It is done. Stopped at step 2 of 3: what guidance multi")
    assert (status.step, status.model_step) == (2, 2)
    two = contents(ended.folder / "model")
    chosen_state.keep(ended, 1)
    card = (ended.folder / "model" / "README.md").read_text()
    assert "- Steps: 1. Stopped at step 2 of 3: what" in card
    assert "better. Then this state of the run was chosen.\n" in card
    chosen_state.keep(ended, 2)
    back = contents(ended.folder / "model")
    assert back == {name: two[name] for name in back}
    assert RunStatus.of(ended).sentence.endswith(
        "no earlier reading was better. Since then the state of step 2 was chosen as its model."
    )


def test_a_process_that_is_killed_leaves_the_old_model_or_the_new_one(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start("run", "--keep_states=3")
    model = run.folder / "model"
    before = contents(model)

    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    for place in ("_write", "_set_aside", "files.exchange"):
        with monkeypatch.context() as patch:
            patch.setattr(f"dreambooth.job.chosen_state.{place}", killed)
            with pytest.raises(Killed):
                chosen_state.keep(run, 1)
        assert contents(model) == before
        assert steps_of(run) == [1, 2, 3]

    def unable(*_: object) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(files, "exchange", unable)
    with pytest.raises(ResourceError, match="The model cannot be written to"):
        chosen_state.keep(run, 1)
    assert contents(model) == before


def test_what_does_not_fit_is_refused_and_changes_nothing(start: Start, tmp_path: Path) -> None:
    run = start("run", "--keep_states=3")
    states, before = run.folder / "checkpoints" / "states", contents(run.folder / "model")
    weights = states / "step-00000001" / "unet.safetensors"
    shutil.copytree(states / "step-00000001", states / "step-00000004")
    (states / "step-00000004" / "unet.safetensors").write_bytes(b"\x80\x04 a pickle")
    (states / "step-x").mkdir()
    os.symlink(states / "step-00000001", states / "step-00000005")
    (states / "step-00000006").mkdir()
    os.symlink(weights, states / "step-00000006" / "unet.safetensors")
    (states / "step-00000007").mkdir()
    shutil.copy(
        run.folder / "model/vae/diffusion_pytorch_model.safetensors",
        states / "step-00000007/unet.safetensors",
    )
    assert steps_of(run) == [1, 2, 3, 4, 7]
    for step, sentence in ((4, "is not a valid safetensors file"), (7, "does not fit its config")):
        with pytest.raises(ModelArtifactError, match=sentence):
            chosen_state.keep(run, step)
    (states / "step-00000002" / "text_encoder.safetensors").touch()
    with pytest.raises(UserError, match="does not hold the parts that the model says were trained"):
        chosen_state.keep(run, 2)
    os.rename(states / "step-00000001", states.parent / "step-00000001")
    os.rename(states, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", states)
    with pytest.raises(UserError, match="is a link, and nothing is written behind it"):
        chosen_state.keep(run, 1)
    with run.changing(), pytest.raises(UserError, match="is running"):
        chosen_state.keep(run, 1)
    for name in ("exit_code", "process.json"):
        (run.folder / name).unlink()
    with pytest.raises(UserError, match="is waiting: let it end first"):
        chosen_state.keep(run, 1)
    assert contents(run.folder / "model") == before


def test_the_room_of_the_states_is_counted(
    start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=64 * 2**20))
    start("few", "--keep_states=3")
    with pytest.raises(AssertionError):
        start("many", "--keep_states=100")
    assert "states to choose from" in capsys.readouterr().err.splitlines()[-1]


def test_a_training_that_begins_anew_makes_its_states_anew(start: Start, tmp_path: Path) -> None:
    run = start("run", "--keep_states=3")
    (run.folder / "checkpoints" / "states" / ".partial-step-00000009").mkdir()
    start("run", "--keep_states=3", "--max_steps=2", "--keep_last_checkpoint")
    states = run.folder / "checkpoints" / "states"
    assert sorted(path.name for path in states.iterdir()) == ["step-00000001", "step-00000002"]
    start("run", "--keep_states=3", "--keep_last_checkpoint")  # it goes on from step 2
    assert sorted(path.name for path in states.iterdir()) == [
        *("step-00000001", "step-00000002", "step-00000003")
    ]
    start("run", "--resume=fresh", "--max_steps=2", "--keep_states=")
    assert not states.exists()


def test_pictures_are_drawn_with_a_state(start: Start, tmp_path: Path) -> None:
    run = start("run", "--keep_states=3")
    drawn = {}
    options = ["--prompt=a photo of cat", "--seed=7", "--num_inference_steps=2", "--count=1"]
    for name, state in (("model", []), ("one", ["--state=1"]), ("three", ["--state=3"])):
        out = tmp_path / name
        argv = ["generate", f"--model={run.folder / 'model'}", f"--out={out}", *options, *state]
        assert main(argv) == 0
        (picture,) = out.glob("*.png")
        with Image.open(picture) as image:
            drawn[name] = image.tobytes()
            assert image.text["model"].endswith(
                {"model": "model", "one": "at step 1"}.get(name, "")
            )
    assert drawn["model"] == drawn["three"] != drawn["one"]
    assert sorted(path.name for path in run.folder.glob("dreambooth-*")) == []
    argv = ["generate", "--model=tiny", f"--out={tmp_path / 'x'}", "--state=1", *options]
    assert main(argv) == 1


@pytest.mark.parametrize(
    ("keep", "stay"),
    [(1, [12]), (2, [11, 12]), (3, [6, 11, 12]), (4, [4, 8, 11, 12]), (12, [*range(1, 13)])],
)
def test_states_lie_evenly_over_the_run_and_the_newest_two_stay(keep: int, stay: list[int]) -> None:
    left: list[int] = []
    for step in range(1, 13):
        left.append(step)
        for gone in too_many(left, keep):
            left.remove(gone)
    assert left[-2:] == stay[-2:]
    assert len(left) == len(stay)
    gaps = np.diff([0, *left[: -2 if keep > 1 else None]])
    assert keep <= 2 or max(gaps) <= 6
