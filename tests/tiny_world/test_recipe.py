from __future__ import annotations

import json
import logging
import random
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from dreambooth.tiny import WEIGHTS
from tiny_world import captions as captioning
from tiny_world import packaging, recipe, tokenizer, world
from tiny_world.lr_schedule import TimedLrSchedule
from tiny_world.recipe import Recipe, RecipeSettings
from tiny_world.text_unet_training import (
    NOISE_SCHEDULE,
    LatentSet,
    TextUnetSettings,
    alphas_cumprod,
    choose_rows,
    draw_timesteps,
    timestep_weights,
)
from tiny_world.vae_training import VaeSettings

MINIATURE = RecipeSettings(
    minutes=0.1,
    vae_share=0.4,
    pictures=24,
    individuals=2,
    pictures_each=3,
    captions_each=2,
    vae=VaeSettings(channels=(8, 8, 8), groups=4, crop_batch=2, whole_batch=2),
    text_unet=TextUnetSettings(
        text_width=16, text_layers=1, text_heads=2, channels=(16, 16), heads=2, groups=4, batch=4,
        named_per_batch=2, checkpoint_seconds=1.0,
    ),
)  # fmt: skip


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import CLIPTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.write(folder, world.WORDS)
    return CLIPTokenizer.from_pretrained(folder)


def test_every_word_of_the_world_is_one_token(words: Any) -> None:
    for word in world.WORDS:
        assert words.tokenize(word) == [word + "</w>"]


@pytest.mark.parametrize(
    "text",
    ["zwx Doppler riobugger", "naïve café", "中文 🐈", "\x00\x7f\u00ad", "it's 42 & co.!", ""],
)
def test_every_string_tokenises_and_nothing_is_unknown(words: Any, text: str) -> None:
    input_ids = words(text).input_ids
    assert input_ids[0] == words.bos_token_id
    assert input_ids[-1] == words.eos_token_id
    assert words.unk_token_id not in input_ids[1:-1]


def test_every_byte_has_a_token_within_and_at_the_end_of_a_word() -> None:
    characters = tokenizer.byte_characters()
    assert len(set(characters)) == 256
    folder = json.loads((WEIGHTS / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    assert {*characters, *(character + "</w>" for character in characters)} <= folder.keys()


def test_the_longest_caption_fits(words: Any) -> None:
    rng = random.Random(0)
    captions = [captioning.caption(scene, rng) for scene in world.corpus(2000, 100, 2, 5)]
    assert max(len(words(caption).input_ids) for caption in captions) <= tokenizer.MAX_LENGTH
    assert words.model_max_length == tokenizer.MAX_LENGTH


def test_later_merges_never_break_earlier_words() -> None:
    merges = tokenizer.learn_merges(["cream", "ear", "real", "area"])
    assert len(set(merges)) == len(merges)


def test_the_schedule_is_that_of_stable_diffusion_2_1_base() -> None:
    from diffusers import DDPMScheduler

    ours = alphas_cumprod()
    reference = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    assert torch.allclose(ours, reference.alphas_cumprod, atol=1e-6)
    shipped = json.loads((WEIGHTS / "scheduler" / "scheduler_config.json").read_text("utf-8"))
    assert shipped["_class_name"] == "PNDMScheduler"
    assert shipped["clip_sample"] is False
    for name, value in NOISE_SCHEDULE.items():
        assert shipped[name] == value


def test_timesteps_lean_to_noise_and_stay_below_1000() -> None:
    timesteps = draw_timesteps(200_000, 0.7, torch.Generator().manual_seed(0))
    assert timesteps.min() >= 0
    assert timesteps.max() == 999
    assert 570 < timesteps.float().mean() < 605  # 1000 / 1.7 = 588
    assert draw_timesteps(100_000, 1e-9).max() == 999


def test_weights_of_timesteps_rise_with_noise_up_to_the_cap() -> None:
    weights = timestep_weights(alphas_cumprod(), 8.0)
    assert (weights.diff() >= 0).all()
    assert weights.min() >= 1.0
    assert weights.max() == 8.0


def test_the_lr_schedule_warms_up_then_falls_and_ends_with_its_time() -> None:
    now = [0.0]
    schedule = TimedLrSchedule(100.0, 1.0, spent_s=0.0, clock=lambda: now[0])
    rates = []
    for second in range(100):
        now[0] = float(second)
        assert not schedule.time_is_up
        rates.append(schedule.learning_rate())
    assert max(rates) == rates[2]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] < 0.02
    now[0] = 100.0
    assert schedule.time_is_up


@pytest.mark.on_demand
def test_the_recipe_runs_end_to_end_goes_on_and_loads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from diffusers import StableDiffusionPipeline

    caplog.set_level(logging.INFO)
    weights = tmp_path / "weights"
    Recipe(MINIATURE, tmp_path / "work").run(weights)
    report = json.loads((weights / packaging.RECIPE_FILE).read_text(encoding="utf-8"))
    assert report["figures"]["vae_steps"] > 0
    assert report["figures"]["text_unet_steps"] > 0
    assert report["sha256"] == packaging.hashes(weights)

    Recipe(MINIATURE, tmp_path / "work").run(tmp_path / "again")
    again = json.loads((tmp_path / "again" / packaging.RECIPE_FILE).read_text(encoding="utf-8"))
    assert again["sha256"] == report["sha256"]

    pipeline = StableDiffusionPipeline.from_pretrained(weights, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("a photo of a cat", num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 64, 64, 3)
    assert np.isfinite(images).all()


def test_the_committed_weights_are_those_of_their_recipe_and_small() -> None:
    report = json.loads((WEIGHTS / packaging.RECIPE_FILE).read_text(encoding="utf-8"))
    assert report["sha256"] == packaging.hashes(WEIGHTS)
    size = sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file())
    assert size <= 14_000_000


def test_the_text_encoder_is_written_for_transformers_4() -> None:
    with safe_open(WEIGHTS / "text_encoder" / "model.safetensors", framework="pt") as tensors:
        names = list(tensors.keys())
        assert tensors.metadata() == {"format": "pt"}
    assert all(name.startswith("text_model.") for name in names)


def test_the_committed_model_loads_plainly_in_one_precision() -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(WEIGHTS, safety_checker=None)
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    assert {part.dtype for part in parts} == {torch.float32}
    text = torch.cat([value.flatten() for value in pipeline.text_encoder.state_dict().values()])
    with safe_open(WEIGHTS / "text_encoder" / "model.safetensors", framework="pt") as tensors:
        name = "text_model.embeddings.token_embedding.weight"
        table = tensors.get_tensor(name).float()
    assert torch.equal(pipeline.text_encoder.get_input_embeddings().weight, table)
    assert torch.isfinite(text).all()


@pytest.mark.parametrize("measure", recipe.MEASURES)
def test_a_special_measure_can_be_left_out(measure: str) -> None:
    whole = TextUnetSettings()
    changed = recipe.without(whole, [measure])
    differing = {
        field.name
        for field in fields(whole)
        if getattr(whole, field.name) != getattr(changed, field.name)
    }
    assert differing == set(recipe.MEASURES[measure])


def test_without_names_a_batch_is_of_anybody() -> None:
    data = LatentSet(
        means=torch.zeros(40, 4, 2, 2),
        stds=torch.zeros(40, 4, 2, 2),
        input_ids=torch.zeros(40, 1, 8, dtype=torch.int16),
        unnamed=30,
        scaling_factor=1.0,
    )
    settings = TextUnetSettings()
    assert int((choose_rows(data, settings) >= 30).sum()) == settings.named_per_batch
    assert int(choose_rows(data, recipe.without(settings, ["names"])).max()) < 30
