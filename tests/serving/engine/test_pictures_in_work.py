from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dreambooth.diffusion import model as models
from dreambooth.diffusion.model import DiffusionModel
from dreambooth.diffusion.sampling_request import SamplingRequest
from dreambooth.serving.engine.drawing_jobs import DrawingJob
from dreambooth.serving.engine.pictures_in_work import PictureInWork, TextCache, gather, places_of


@pytest.fixture(scope="module")
def model(small_model_folder: Path) -> DiffusionModel:
    return models.load(small_model_folder, device=torch.device("cpu"))


def request(seed: int = 0, **options: Any) -> SamplingRequest:
    return SamplingRequest(prompt="a cat", seed=seed, **options)


def row(number: int, *, guided: bool, places: tuple[int, ...] | None = None) -> PictureInWork:
    """Return a row whose text is filled with `number`, and its negative prompt with -`number`."""
    scale = 2.0 + number if guided else 1.0
    job = DrawingJob([request(guidance_scale=scale)])
    return PictureInWork(
        job=job,
        index=0,
        size=(8, 8),
        places=places,
        prompt=torch.full((2, 3), float(number)),
        negative_prompt=torch.full((2, 3), -float(number)) if guided else None,
    )


def numbers(hidden: torch.Tensor) -> list[float]:
    return hidden[:, 0, 0].tolist()


def test_the_negative_prompts_of_guided_pictures_come_first() -> None:
    text = gather([row(1, guided=True), row(2, guided=False), row(3, guided=True)], call_rows=None)
    assert numbers(text.encoder_hidden_states) == [-1, -3, 1, 2, 3]
    assert text.guided.tolist() == [0, 2]
    assert text.guidance_scale.flatten().tolist() == [3.0, 5.0]
    assert text.placement is None


def test_a_padded_call_repeats_its_first_row() -> None:
    text = gather([row(1, guided=True), row(2, guided=False)], call_rows=5)
    assert numbers(text.encoder_hidden_states) == [-1, 1, 2, -1, -1]
    assert text.placement is not None
    assert text.placement.places.tolist() == [0, 1, 2]
    assert text.placement.sources.tolist() == [0, 1, 2, 0, 0]


def test_pictures_that_have_places_get_them() -> None:
    rows = [row(1, guided=True, places=(1, 4)), row(2, guided=False, places=(3,))]
    text = gather(rows, call_rows=6)
    assert numbers(text.encoder_hidden_states)[1] == -1
    assert numbers(text.encoder_hidden_states)[4] == 1
    assert numbers(text.encoder_hidden_states)[3] == 2
    assert text.placement is not None
    assert text.placement.places.tolist() == [1, 4, 3]


@pytest.mark.parametrize("rows", [2, 3, 4, 7, 8])
@pytest.mark.parametrize("seed", [0, 1, 5, 2**64 - 1])
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_places_lie_in_the_call_and_depend_on_the_seed_alone(
    rows: int, seed: int, guidance_scale: float
) -> None:
    places = places_of(request(seed, guidance_scale=guidance_scale), rows)
    assert len(set(places)) == len(places) == (2 if guidance_scale > 1 else 1)
    assert all(0 <= place < rows for place in places)
    other = request(seed, guidance_scale=guidance_scale, negative_prompt="snow", width=16)
    assert places_of(other, rows) == places


def test_consecutive_seeds_fill_a_call() -> None:
    places = [place for seed in range(7, 11) for place in places_of(request(seed), 8)]
    assert sorted(places) == list(range(8))


def test_a_string_is_encoded_once_and_alone(model: DiffusionModel) -> None:
    shapes: list[int] = []
    hook = model.text_encoder.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(len((args or (kwargs["input_ids"],))[0])),
        with_kwargs=True,
    )
    try:
        cache = TextCache(model)
        first = cache.get("a photo of a cat")
        assert cache.get("a photo of a cat") is first
        cache.get("snow")
    finally:
        hook.remove()
    assert shapes == [1, 1]
    expected = models.encode_text(model, models.tokenize(model, ["a photo of a cat"]))[0]
    assert torch.equal(first, expected)


def test_the_cache_keeps_the_strings_used_last(model: DiffusionModel) -> None:
    cache = TextCache(model, most=2)
    cat = cache.get("cat")
    cache.get("dog")
    cache.get("cat")
    cache.get("snow")  # this removes dog
    assert len(cache) == 2
    assert cache.get("cat") is cat
    cache.clear()
    assert len(cache) == 0
    assert torch.equal(cache.get("cat"), cat)
