from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dreambooth.errors import HyperparameterError, ResourceError, TrainingDivergedError
from dreambooth.training import state as states

Make = Callable[..., Any]
IDENTITY = {"learning_rate": "0.001", "data": "abc"}
FAST = {"fast_step": True, "checkpointing_steps": 3}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_8bit_adam": True},
        {"mixed_precision": "fp16"},
        {"train_text_encoder": True},
        {"memory_plan": "8bit_adamw_checkpointing"},
        {"memory_plan": "8bit_adamw_in_backward", "mixed_precision": "bf16"},
        {**FAST, "mixed_precision": "bf16"},
        {**FAST, "mixed_precision": "bf16", "use_8bit_adam": True},
    ],
    ids=[
        *("plain", "8-bit", "fp16", "text encoder"),
        *("checkpointing", "in backward, bf16"),
        *("fast step", "fast step, 8-bit"),
    ],
)
def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(
    make_training: Make, tmp_path: Path, changes: dict[str, object]
) -> None:
    changes = {"max_steps": 6, "with_prior_preservation": True, "lr_scheduler": "cosine", **changes}
    unbroken = make_training(**changes)
    expected = list(unbroken.steps())

    first = make_training(**changes)
    for metrics in first.steps():
        if metrics.step == 3:
            states.save(first.state, tmp_path, identity=IDENTITY, keep=1)
            break
    second = make_training(**changes)
    assert states.load_newest(second.state, tmp_path, identity=IDENTITY)
    assert second.state.step == 3
    assert list(second.steps()) == expected[3:]
    assert torch.equal(second.weights(), unbroken.weights())
    if unbroken.state.text_encoder is not None:
        for a, b in zip(
            unbroken.state.text_encoder.parameters(),
            second.state.text_encoder.parameters(),
            strict=True,
        ):
            assert torch.equal(a, b)


def test_memory_that_runs_out_while_resuming_is_no_fault_of_the_checkpoint(
    make_training: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A smaller memory plan may have room for it."""

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    training = make_training(max_steps=2)
    next(training.steps())
    states.save(training.state, tmp_path, identity=IDENTITY, keep=1)
    monkeypatch.setattr(states.optimizers, "load", fail)
    with pytest.raises(torch.OutOfMemoryError):
        states.load_newest(make_training(max_steps=2).state, tmp_path, identity=IDENTITY)


def test_the_loss_scale_is_resumed(make_training: Make, tmp_path: Path) -> None:
    first, second = (make_training(max_steps=2, mixed_precision="fp16") for _ in range(2))
    next(first.steps())
    first.state.precision.scaler.update(new_scale=1024.0)
    states.save(first.state, tmp_path, identity=IDENTITY, keep=1)
    assert second.state.precision.loss_scale != 1024.0
    assert states.load_newest(second.state, tmp_path, identity=IDENTITY)
    assert second.state.precision.loss_scale == 1024.0


def test_only_the_newest_are_kept_and_strange_names_left_alone(
    make_training: Make, tmp_path: Path
) -> None:
    training = make_training()
    (tmp_path / "step-notes").mkdir()
    for _ in training.steps():
        states.save(training.state, tmp_path, identity=IDENTITY, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000003",
        "step-00000004",
        "step-notes",
    ]


def test_a_changed_setting_is_named(make_training: Make, tmp_path: Path) -> None:
    training = make_training()
    states.save(training.state, tmp_path, identity=IDENTITY, keep=1)
    changed = {**IDENTITY, "learning_rate": "0.01"}
    with pytest.raises(
        HyperparameterError, match=r"learning_rate was 0\.001 and is now 0\.01.*resume=fresh"
    ):
        states.load_newest(training.state, tmp_path, identity=changed)


def test_another_prediction_type_is_another_model_but_earlier_versions_did_not_store_it(
    make_training: Make, tmp_path: Path
) -> None:
    training = make_training()
    said = {**IDENTITY, "prediction_type": "epsilon"}
    states.save(training.state, tmp_path, identity=IDENTITY, keep=1)
    assert states.load_newest(training.state, tmp_path, identity=said)
    states.save(training.state, tmp_path, identity=said, keep=1)
    changed = {**IDENTITY, "prediction_type": "v_prediction"}
    with pytest.raises(HyperparameterError, match="prediction_type was epsilon and is now v_pred"):
        states.load_newest(training.state, tmp_path, identity=changed)


def test_a_checkpoint_of_a_version_without_training_guidance_goes_on_without_it(
    make_training: Make, tmp_path: Path
) -> None:
    training = make_training()
    states.save(training.state, tmp_path, identity=IDENTITY, keep=1)
    default, other = ({**IDENTITY, "training_guidance_scale": scale} for scale in ("1.0", "2.0"))
    assert states.load_newest(training.state, tmp_path, identity=default)
    with pytest.raises(HyperparameterError, match=r"scale was unset and is now 2\.0"):
        states.load_newest(training.state, tmp_path, identity=other)


def test_only_a_plan_that_was_chosen_by_itself_may_change(
    make_training: Make, tmp_path: Path
) -> None:
    first = make_training(max_steps=4)
    for metrics in first.steps():
        if metrics.step == 2:
            break
    automatic = {**IDENTITY, "memory_plan": "auto", "use_8bit_adam": "False"}
    states.save(first.state, tmp_path, identity=automatic, keep=1)
    smaller = make_training(max_steps=4, use_8bit_adam=True)
    changed = {**automatic, "use_8bit_adam": "True"}
    assert states.load_newest(smaller.state, tmp_path, identity=changed)
    assert torch.equal(smaller.weights(), first.weights())
    assert [metrics.step for metrics in smaller.steps()] == [3, 4]
    named = {**changed, "memory_plan": "8bit_adamw"}
    with pytest.raises(HyperparameterError, match="memory_plan was auto"):
        states.load_newest(smaller.state, tmp_path, identity=named)


@pytest.mark.parametrize("name", ["unet.safetensors", "optimizer.pt", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "a pipe"])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(
    make_training: Make,
    tmp_path: Path,
    name: str,
    damage: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    training = make_training(max_steps=2)
    for _ in training.steps():
        newest = states.save(training.state, tmp_path, identity=IDENTITY, keep=2)
    content = (newest / name).read_bytes()
    if damage == "cut":
        (newest / name).write_bytes(content[:-20])
    elif damage == "flip":
        flipped = bytearray(content)
        flipped[1] ^= 0xFF
        (newest / name).write_bytes(bytes(flipped))
    else:
        (newest / name).unlink()
        if damage == "a pipe":
            os.mkfifo(newest / name)
    fresh = make_training(max_steps=2)
    assert states.load_newest(fresh.state, tmp_path, identity=IDENTITY)
    assert fresh.state.step == 1
    assert "damaged and skipped" in caplog.text


def test_without_a_checkpoint_nothing_is_loaded(make_training: Make, tmp_path: Path) -> None:
    training = make_training()
    assert not states.load_newest(training.state, tmp_path, identity=IDENTITY)
    assert not states.load_newest(training.state, tmp_path / "none", identity=IDENTITY)


def test_a_full_disk_leaves_the_checkpoint_before(
    make_training: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = make_training(max_steps=2)
    steps = training.steps()
    next(steps)
    states.save(training.state, tmp_path, identity=IDENTITY, keep=1)
    next(steps)

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(states, "fsync", full)
    with pytest.raises(ResourceError, match="No space left on device"):
        states.save(training.state, tmp_path, identity=IDENTITY, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_the_manifest_names_versions_threads_and_hashes(
    make_training: Make, tmp_path: Path
) -> None:
    training = make_training()
    path = states.save(training.state, tmp_path, identity=IDENTITY, keep=1)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["environment"]["torch"] == torch.__version__
    assert manifest["environment"]["threads"] == str(torch.get_num_threads())
    assert set(manifest["files"]) == {"unet.safetensors", "optimizer.pt"}


def test_a_run_that_starts_over_below_an_old_checkpoint_keeps_its_own(
    make_training: Make, tmp_path: Path
) -> None:
    old = make_training(max_steps=4)
    for _ in old.steps():
        pass
    states.save(old.state, tmp_path, identity=IDENTITY, keep=1)
    fresh = make_training(max_steps=2)
    # Nothing was cleared; the checkpoint just written is never the one removed.
    for _ in fresh.steps():
        states.save(fresh.state, tmp_path, identity=IDENTITY, keep=1)
        assert [path.name for path in tmp_path.iterdir()] == [f"step-{fresh.state.step:08d}"]
    states.clear(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_was_writing_is_removed(make_training: Make, tmp_path: Path) -> None:
    training = make_training(max_steps=2)
    steps = training.steps()
    next(steps)
    (tmp_path / ".partial-step-00000009").mkdir(parents=True)
    states.save(training.state, tmp_path, identity=IDENTITY, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    (tmp_path / ".partial-step-00000009").mkdir()
    (tmp_path / "step-00000000").mkdir()  # a removal was interrupted
    states.tidy(training.state, tmp_path, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_the_checkpoint_resumed_from_outlives_a_damaged_newer_one(
    make_training: Make, tmp_path: Path
) -> None:
    training = make_training(max_steps=2)
    steps = training.steps()
    next(steps)
    states.save(training.state, tmp_path, identity=IDENTITY, keep=2)
    (tmp_path / "step-00000007").mkdir()
    fresh = make_training(max_steps=2)
    assert states.load_newest(fresh.state, tmp_path, identity=IDENTITY)
    states.tidy(fresh.state, tmp_path, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_weights_that_are_not_finite_are_no_checkpoint(make_training: Make, tmp_path: Path) -> None:
    training = make_training(max_steps=2)
    steps = training.steps()
    next(steps)
    good = states.save(training.state, tmp_path, identity=IDENTITY, keep=1)
    next(training.state.unet.parameters()).data.fill_(float("inf"))
    with pytest.raises(TrainingDivergedError, match=good.name):
        states.save(training.state, tmp_path, identity=IDENTITY, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == [good.name]


@pytest.mark.parametrize(
    "change",
    [
        {"step": "one"},
        {"identity": None},
        {"environment": []},
        {"scaler": 1},
        {"loss_total": "1"},
        {"files": ["unet.safetensors"]},
        {"files": {"../outside": "0"}},
        {"format": 99},
    ],
)
def test_a_manifest_that_was_tampered_with_is_damaged(
    make_training: Make,
    tmp_path: Path,
    change: dict[str, object],
    caplog: pytest.LogCaptureFixture,
) -> None:
    training = make_training(max_steps=1)
    path = states.save(training.state, tmp_path, identity=IDENTITY, keep=1) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert not states.load_newest(training.state, tmp_path, identity=IDENTITY)
    assert "damaged and skipped" in caplog.text


def test_a_checkpoint_of_other_parts_is_refused(make_training: Make, tmp_path: Path) -> None:
    training = make_training(max_steps=1)
    path = states.save(training.state, tmp_path, identity=IDENTITY, keep=1) / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"]["unet.safetensors"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(HyperparameterError, match="resume=fresh"):
        states.load_newest(training.state, tmp_path, identity=IDENTITY)
