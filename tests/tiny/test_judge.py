from __future__ import annotations

import numpy as np
import pytest
import torch

from dreambooth.tiny import WEIGHTS, data_sets, judge_network, world
from dreambooth.tiny import judge as judging


@pytest.fixture(scope="module")
def held_out() -> tuple[list[world.Scene], np.ndarray]:
    scenes = [world.random_scene(f"judge test/{index}") for index in range(300)]
    return scenes, np.stack([np.asarray(world.draw(scene), dtype=np.uint8) for scene in scenes])


def test_the_judge_reads_held_out_drawings(
    held_out: tuple[list[world.Scene], np.ndarray],
) -> None:
    shares = judging.accuracy(judge_network.load(), *held_out)
    assert shares.keys() == judging.ATTRIBUTES.keys()
    assert min(shares.values()) >= 0.97, shares


def test_the_judge_knows_the_shipped_subjects_and_tells_them_apart() -> None:
    judge = judge_network.load()
    for data_set in data_sets.DATA_SETS:
        drawn = np.stack([np.asarray(world.draw(scene)) for scene in data_set.scenes()])
        verdicts = judging.read(judge, drawn)
        for name, look in world.SUBJECTS.items():
            share = np.mean([verdict.is_like(look) for verdict in verdicts])
            assert share >= 0.75 if name == data_set.subject else share == 0.0


def test_fur_and_collar_of_a_sketch_are_not_scored() -> None:
    sketch = next(
        scene
        for scene in (world.random_scene(str(index)) for index in range(99))
        if scene.style == "sketch"
    )
    labels = judging.labels_of([sketch])
    assert labels["fur"].item() == labels["collar"].item() == -100
    assert labels["species"].item() >= 0


def test_softened_pictures_stay_in_place_and_range() -> None:
    pixels = torch.rand(8, 3, 64, 64) * 2 - 1
    soft = judging.soften(pixels)
    assert soft.shape == pixels.shape
    assert soft.abs().max() < 1.5
    assert (soft[3] - pixels[3]).abs().mean() < 0.05


def test_a_judge_is_trained_and_saved_in_seconds(tmp_path_factory: pytest.TempPathFactory) -> None:
    scenes = [world.random_scene(str(index)) for index in range(32)]
    pictures = np.stack([np.asarray(world.draw(scene), dtype=np.uint8) for scene in scenes])
    judge, steps = judging.train(scenes, pictures, seconds=1.0, seed=0)
    assert steps > 0
    path = tmp_path_factory.mktemp("judge") / "judge.safetensors"
    judge_network.save(judge, path)
    assert len(judging.read(judge_network.load(path), pictures)) == 32


def test_every_word_is_asked_for_and_the_committed_judge_is_small() -> None:
    asked = judging.questions()
    for name, labels in judging.ATTRIBUTES.items():
        wanted = {label for label in labels if label not in ("none", "photo")}
        assert wanted == {label for _, attribute, label in asked if attribute == name}
    assert judge_network.JUDGE_WEIGHTS.stat().st_size <= 1_500_000


def test_shares_are_averaged_by_attribute() -> None:
    shares = dict.fromkeys((prompt for prompt, _, _ in judging.questions()), 0.5)
    assert judging.by_attribute(shares) == dict.fromkeys(judging.ATTRIBUTES, 0.5)


def test_the_committed_model_draws_what_is_asked() -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(WEIGHTS, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    asked = {
        "a photo of a dog on a beach": {"species": "dog", "setting": "beach", "style": "photo"},
        "a photo of an orange striped cat": {"species": "cat", "fur": "orange"},
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
