"""Unusual channels: read-only and FastFile mounts, stray files, odd names, other tarballs."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from dreambooth.tiny import WEIGHTS

TINY = {"pretrained_model": "tiny", "learning_rate": "1e-4", "max_steps": 2}
PRIOR = {"with_prior_preservation": True, "num_class_images": 2}
Docker = Callable[..., subprocess.CompletedProcess[str]]
Tree = Callable[..., Path]
Holds = Callable[[Path], bool]


def base_tarball(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    subprocess.run(["tar", "-czf", path, "-C", WEIGHTS, "."], check=True)


def test_a_read_only_fastfile_channel_full_of_stray_files_trains(
    train: Docker, tree: Tree, model_in: Holds
) -> None:
    root = tree(**TINY, **PRIOR)
    training = root / "input/data/training"
    for number in range(3000):
        (training / f"nötiz {number}.txt").write_text("no picture")
    channels = {"training": {"TrainingInputMode": "FastFile"}}
    (root / "input/config/inputdataconfig.json").write_text(json.dumps(channels))
    before = sorted(training.iterdir())
    mount = f"--volume={training}:/opt/ml/input/data/training:ro"
    done = train(root, mount)
    assert model_in(root)
    assert sorted(training.iterdir()) == before
    assert len(list((root / "output/data/class_images").rglob("*.png"))) == 2
    (line,) = [line for line in done.stderr.splitlines() if "nötiz" in line]
    assert "and 2995 more" in line


def test_spaces_unicode_and_stray_bytes_in_names_train(
    train: Docker, tree: Tree, model_in: Holds
) -> None:
    root = tree(
        **TINY, with_prior_preservation=True, num_class_images=2, class_data_dir="прочие 猫"
    )
    training = root / "input/data/training"
    others = training / "прочие 猫"
    others.mkdir()
    first, second, third, fourth, *_ = sorted(training.glob("*.png"))
    first.rename(others / "a cat (1).png")
    second.rename(others / "--max_steps 9 ü.png")
    third.rename(training / "наш кот 🐈.png")
    os.rename(fourth, os.fsencode(training) + b"/caf\xe9 \n.png")
    base_tarball(root / "input/data/model/мой base (1).tar.gz")
    settings = json.loads((root / "input/config/hyperparameters.json").read_text())
    del settings["pretrained_model"]
    (root / "input/config/hyperparameters.json").write_text(json.dumps(settings))
    done = train(root)
    assert model_in(root)
    assert "6 instance images" in done.stdout + done.stderr


@pytest.mark.parametrize("name", ["other.tar.gz", "output.tar.gz"])
def test_a_stray_tarball_beside_the_model_is_not_taken_for_it(
    train: Docker, tree: Tree, model_in: Holds, name: str
) -> None:
    root = tree(max_steps=2, learning_rate="1e-4")
    channel = root / "input/data/model"
    base_tarball(channel / "base.tar.gz")
    subprocess.run(
        ["tar", "-czf", channel / name, "-C", root, "output", "input/config"], check=True
    )
    train(root, f"--volume={channel}:/opt/ml/input/data/model:ro")
    assert model_in(root)


def test_a_channel_in_pipe_mode_is_reported(train: Docker, tree: Tree) -> None:
    root = tree(**TINY)
    training = root / "input/data/training"
    training.rename(root / "aside")
    os.mkfifo(root / "input/data/training_0")
    done = train(root, check=False)
    assert done.returncode == 1
    assert "training" in (root / "output/failure").read_text()
