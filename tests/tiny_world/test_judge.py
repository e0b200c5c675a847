from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dreambooth.tiny import WEIGHTS, judge_network
from tiny_world import data_sets, world
from tiny_world import judge as judging


@pytest.fixture(scope="module")
def held_out() -> tuple[list[world.Scene], np.ndarray]:
    return judging.drawings("judge test", 1200)


def test_the_judge_reads_held_out_drawings(
    held_out: tuple[list[world.Scene], np.ndarray],
) -> None:
    # One drawing in nine is a sketch, which has no colours to read.
    told = {
        name: int((labels >= 0).sum()) for name, labels in judging.labels_of(held_out[0]).items()
    }
    assert min(told.values()) >= 1000, told
    shares = judging.accuracy(judge_network.load(), *held_out)
    assert shares.keys() == judging.ATTRIBUTES.keys()
    assert min(shares.values()) >= 0.98, shares


def is_like(verdict: judging.Verdict, look: world.Look) -> bool:
    shown = (verdict.species, verdict.color, verdict.marking, verdict.collar)
    return shown == look.combination


def test_the_judge_knows_the_shipped_subjects_and_tells_them_apart() -> None:
    judge = judge_network.load()
    for data_set in data_sets.DATA_SETS:
        drawn = np.stack([np.asarray(world.draw(scene)) for scene in data_set.scenes()])
        verdicts = judging.read(judge, drawn)
        for name, look in world.SUBJECTS.items():
            share = np.mean([is_like(verdict, look) for verdict in verdicts])
            assert share >= 0.75 if name == data_set.subject else share == 0.0


def test_colours_of_a_sketch_are_not_scored() -> None:
    sketch = next(
        scene
        for scene in (world.random_scene(str(index)) for index in range(99))
        if scene.style == "sketch"
    )
    labels = judging.labels_of([sketch])
    assert {labels[name].item() for name in ("color", "collar", "seat")} == {-100}
    assert labels["species"].item() >= 0


def test_softened_pictures_stay_in_place_and_range() -> None:
    pixels = torch.rand(8, 3, 64, 64) * 2 - 1
    soft = judging.soften(pixels)
    assert soft.shape == pixels.shape
    assert soft.abs().max() < 1.5
    assert (soft[3] - pixels[3]).abs().mean() < 0.05


def test_the_committed_judge_is_that_of_its_recipe_and_small() -> None:
    path = judge_network.JUDGE_WEIGHTS
    assert path.stat().st_size <= 1_500_000
    recipe = json.loads((path.parent / judging.RECIPE_FILE).read_text(encoding="utf-8"))
    assert recipe["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert recipe["held_out"]["drawings"] == judging.HELD_OUT
    shares = recipe["held_out"]["accuracy"]
    assert shares.keys() == judging.ATTRIBUTES.keys()
    assert min(shares.values()) >= 0.98


def test_training_a_judge_writes_its_recipe_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(judging, "HELD_OUT", 20)
    path = tmp_path / "judge.safetensors"
    options = ["--judge", str(path), "--threads", "1"]
    judging.main([*options, "train", "--minutes", "0.02", "--pictures", "32", "--seed", "3"])
    recipe = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert recipe == json.loads((tmp_path / judging.RECIPE_FILE).read_text(encoding="utf-8"))
    assert recipe["settings"] == {"seed": 3, "pictures": 32, "minutes": 0.02}
    assert recipe["steps"] > 0
    assert recipe["held_out"]["drawings"] == 20
    assert len(judging.read(judge_network.load(path), judging.drawings("x", 3)[1])) == 3


@pytest.mark.on_demand
def test_the_committed_model_draws_what_is_asked() -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(WEIGHTS, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    asked = {
        "a photo of a dog on a beach": {"species": "dog", "setting": "beach", "style": "photo"},
        "a photo of an orange striped cat": {"species": "cat", "color": "orange"},
        "a photo of a cat with a blue collar": {"species": "cat", "collar": "blue"},
        "a pencil sketch of a dog": {"species": "dog", "style": "sketch"},
    }
    prompts = [prompt for prompt in asked for _ in range(5)]
    images = pipeline(
        prompts,
        num_inference_steps=20,
        guidance_scale=3.5,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in range(len(prompts))],
        output_type="np",
    ).images
    verdicts = judging.read(judge_network.load(), (images * 255).round().astype(np.uint8))
    right = [
        getattr(verdict, name) == label
        for verdict, prompt in zip(verdicts, prompts, strict=True)
        for name, label in asked[prompt].items()
    ]
    assert np.mean(right) >= 0.85
