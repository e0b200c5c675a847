from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dreambooth.data import cache, images, sample_draws
from dreambooth.diffusion import model as models

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(small_model_folder: Path) -> models.DiffusionModel:
    return models.load(small_model_folder, device=CPU)


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    generator = np.random.default_rng(0)
    paths = []
    for number, size in enumerate([(40, 40), (60, 40), (40, 90)]):
        path = tmp_path / f"{number}.png"
        pixels = generator.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        paths.append(path)
    return paths


def build(
    photos: list[Path], model: models.DiffusionModel, **changes: object
) -> cache.LatentPosteriors:
    settings: dict[str, object] = {"resolution": 32, "center_crop": False, "crops_per_picture": 5}
    return cache.build(
        photos,
        encode_image=lambda pixels: models.encode_posterior(model, pixels),
        **{**settings, "seed": 0, "stream": "instance", **changes},
    )


def test_pictures_that_are_not_square_get_several_crops(
    photos: list[Path], model: models.DiffusionModel
) -> None:
    assert build(photos, model).crop_counts == (1, 5, 5)
    assert build(photos, model, center_crop=True).crop_counts == (1, 1, 1)


def test_random_crops_differ_and_are_a_function_of_the_seed(
    photos: list[Path], model: models.DiffusionModel
) -> None:
    first, again = build(photos, model), build(photos, model)
    assert torch.equal(first.mean, again.mean)
    assert not torch.equal(first.mean, build(photos, model, seed=1).mean)
    crops = first.mean[1:6]
    assert len({crop.numpy().tobytes() for crop in crops}) > 1


def test_instance_and_class_images_of_one_number_are_cropped_apart(
    photos: list[Path], model: models.DiffusionModel
) -> None:
    instance, class_ = build(photos, model), build(photos, model, stream="class")
    assert torch.equal(instance.mean[0], class_.mean[0])  # a square picture has only one crop
    for picture in (1, 2):
        rows = slice(instance.first_rows[picture], instance.first_rows[picture] + 5)
        assert not torch.equal(instance.mean[rows], class_.mean[rows])


def test_a_cached_sample_equals_encoding_the_crop_at_that_step(
    photos: list[Path], model: models.DiffusionModel
) -> None:
    posteriors = build(photos, model)
    samples = sample_draws.draw(
        range(6),
        seed=0,
        stream="instance",
        crop_counts=posteriors.crop_counts,
        latent_shape=posteriors.latent_shape,
        train_timesteps=1000,
    )
    cached = posteriors.sample(samples)
    for row in range(6):
        picture, crop = int(samples.images[row]), int(samples.crop_indices[row])
        resized = images.resize(images.open_image(photos[picture]), 32)
        left, top = cache.crop_boxes(
            resized.size,
            resolution=32,
            center=False,
            crops_per_picture=5,
            seed=0,
            stream="instance",
            key=picture,
        )[crop]
        pixels = cache.to_pixels(images.to_array(resized.crop((left, top, left + 32, top + 32))))
        posterior = model.vae.encode(pixels[None]).latent_dist
        encoded = posterior.mean + posterior.std * samples.posterior_noise[row]
        assert torch.equal(cached[row], encoded[0])


def test_the_posterior_is_sampled_afresh(photos: list[Path], model: models.DiffusionModel) -> None:
    posteriors = build(photos[:1], model)
    draws = [
        posteriors.sample(
            sample_draws.draw(
                range(number, number + 1),
                seed=0,
                stream="instance",
                crop_counts=posteriors.crop_counts,
                latent_shape=posteriors.latent_shape,
                train_timesteps=1000,
            )
        )
        for number in range(400)
    ]
    spread = torch.cat(draws).std(dim=0)
    assert torch.allclose(spread, posteriors.std[0], rtol=0.25)


def test_known_latents_stand_for_their_picture_which_is_not_opened(
    photos: list[Path], model: models.DiffusionModel, tmp_path: Path
) -> None:
    gone, latents, done = tmp_path / "gone.png", torch.randn(model.latent_channels, 16, 16), []
    posteriors = build(
        [photos[1], gone, photos[0]],
        model,
        known=lambda path: latents if path == gone else None,
        on_image=done.append,
    )
    assert (posteriors.first_rows, posteriors.crop_counts) == ((0, 5, 6), (5, 1, 1))
    assert torch.equal(posteriors.mean[5], latents)
    assert not posteriors.std[5].any()
    assert torch.equal(posteriors.mean[6], build(photos, model).mean[0])
    assert done == [1, 2, 3]


def test_pixels_cover_minus_one_to_one() -> None:
    picture = np.array([[[0, 127, 255]]], dtype=np.uint8)
    assert cache.to_pixels(picture).flatten().tolist() == pytest.approx([-1, -0.00392, 1], abs=1e-4)


def test_progress_is_reported(photos: list[Path], model: models.DiffusionModel) -> None:
    done: list[int] = []
    build(photos, model, on_image=done.append)
    assert done == [1, 2, 3]


def test_what_is_kept_is_all_that_many_pictures_cost(tmp_path: Path) -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    def encode(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = torch.nn.functional.avg_pool2d(pixels, 8)
        return mean, mean

    path = tmp_path / "1.png"
    Image.new("RGB", (512, 512), "red").save(path)
    before = resident_bytes()
    cached = cache.build(
        [path] * 150,
        resolution=512,
        center_crop=False,
        crops_per_picture=1,
        seed=0,
        stream="class",
        encode_image=encode,
    )
    kept = 2 * cached.mean.numel() * 4
    assert resident_bytes() - before < kept + 60 * 2**20  # it used to be 400 MiB
