from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from dreambooth.data import cache, class_latents, dataset_info
from dreambooth.diffusion import model as models
from dreambooth.diffusion import sampling
from dreambooth.diffusion.decoding import decode
from dreambooth.diffusion.denoising import advance
from dreambooth.diffusion.model import DiffusionModel
from dreambooth.diffusion.sampling_request import SamplingRequest
from dreambooth.errors import ResourceError
from dreambooth.fast.cuda_graphs import CapturedCall
from dreambooth.job import class_sampling, outputs
from dreambooth.job.class_sampling import (
    batch_size,
    class_image_paths,
    known_latents,
    pictures_per_call,
    with_fast_solver,
)
from dreambooth.job.task import Task
from dreambooth.model_folder.facts import read_facts
from dreambooth.settings import container
from dreambooth.settings.hyperparameters import Hyperparameters
from dreambooth.training import expected_memory
from dreambooth.training import plan as plans
from dreambooth.training.device import CPU, DeviceFacts
from dreambooth.training.memory_plan import OVERHEAD_BYTES, usable_bytes
from tests.fast.graph_stand_in import Recalls

Folder = Callable[..., Path]


def load(folder: Path) -> DiffusionModel:
    return models.load(folder, device=torch.device("cpu"))


@pytest.fixture
def task(small_model_folder: Path, tmp_path: Path) -> Task:
    """Return a task with one given class image and three to be sampled."""
    photos = tmp_path / "photos"
    for folder in (photos, photos / "class_data_dir"):
        folder.mkdir()
        Image.effect_noise((64, 48), 90).convert("RGB").save(folder / "class_00000.png")
    prompts = '{"instance_prompt": "a photo of doppler dog", "class_prompt": "a photo of dog"}'
    (photos / "dataset_info.json").write_text(prompts)
    return task_of(small_model_folder, photos, tmp_path / "out")


def task_of(model: Path, photos: Path, out: Path, **settings: Any) -> Task:
    options = [f"--train={photos}", f"--model_dir={out / 'model'}", f"--output_data_dir={out}"]
    environment = container.read(options, {})
    hyperparameters = Hyperparameters(
        with_prior_preservation=True, num_class_images=4, max_steps=1, **settings
    )
    dataset = dataset_info.read(photos, with_prior_preservation=True)
    return Task(
        environment=environment,
        hyperparameters=hyperparameters,
        dataset=dataset,
        plan=plans.make(hyperparameters, dataset, read_facts(model), CPU),
        model_folder=model,
        base_name="base",
        device=torch.device("cpu"),
    )


def posteriors(task: Task, paths: Iterable[Path]) -> cache.LatentPosteriors:
    model = load(task.model_folder)
    return cache.build(
        list(paths),
        resolution=task.resolution,
        center_crop=False,
        crops_per_picture=1,
        seed=0,
        stream="class",
        encode_image=lambda pixels: models.encode_posterior(model, pixels),
        known=known_latents(task, model),
    )


def test_sampled_latents_are_trained_on_as_they_are(task: Task) -> None:
    paths = class_image_paths(task)
    assert [path.parent.name for path in paths] == ["class_data_dir"] + ["class_images"] * 3
    model = load(task.model_folder)
    cached = posteriors(task, paths)
    encoded = models.encode_posterior(model, pixels_of(paths[0], task.resolution))
    assert torch.equal(cached.mean[0], encoded[0][0])  # a given image is encoded as usual
    assert bool((cached.std[0] > 0).all())
    assert not cached.std[1:].any()
    for row, path in enumerate(paths[1:], start=1):
        picture = decode(model, cached.mean[row : row + 1] * model.vae.config.scaling_factor)
        assert picture is not None
        levels = np.abs(picture[0].astype(int) - np.asarray(Image.open(path)).astype(int))
        assert levels.max() <= 1


def pixels_of(path: Path, side: int) -> torch.Tensor:
    from dreambooth.data import images

    picture = images.resize(images.open_image(path), side)
    ((left, top),) = cache.crop_boxes(
        picture.size,
        resolution=side,
        center=False,
        crops_per_picture=1,
        seed=0,
        stream="class",
        key=0,
    )
    return cache.to_pixels(images.to_array(picture.crop((left, top, left + side, top + side))))[
        None
    ]


def test_latents_outlive_a_restart_and_their_loss_costs_an_encoding(
    task: Task, caplog: pytest.LogCaptureFixture
) -> None:
    paths = class_image_paths(task)
    before = posteriors(task, paths)
    assert class_image_paths(task) == paths  # as after a restart: nothing is sampled
    assert torch.equal(posteriors(task, paths).mean, before.mean)
    class_latents.place_of(paths[1]).unlink()
    class_latents.place_of(paths[2]).write_bytes(b"damaged")
    shutil.copy(class_latents.place_of(paths[1].with_name("class_00001.png")), paths[3].parent)
    after = posteriors(task, paths)
    assert "class_00001.safetensors is not used" in caplog.text
    assert [bool(std.any()) for std in after.std] == [True, True, True, False]
    assert torch.equal(after.mean[3], before.mean[3])


def test_a_job_with_another_seed_takes_neither_pictures_nor_latents(task: Task) -> None:
    paths = class_image_paths(task)
    other = dataclasses.replace(
        task, hyperparameters=dataclasses.replace(task.hyperparameters, seed=9)
    )
    known = known_latents(other, load(task.model_folder))
    assert [known(path) for path in paths] == [None] * 4


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_25_steps_of_the_solver_end_where_the_prediction_points(
    make_model_folder: Folder, prediction_type: str
) -> None:
    """If the U-Net always predicts one clean picture, a correct solver ends at that picture."""
    model, steps = with_fast_solver(load(make_model_folder(prediction_type=prediction_type)))
    assert steps == 25
    assert type(models.sampling_scheduler(model)).__name__ == "DPMSolverMultistepScheduler"
    clean = torch.randn(1, model.latent_channels, 16, 16)
    alphas = models.training_noise_scheduler(model).alphas_cumprod

    class Knowing(torch.nn.Module):
        dtype = torch.float32

        def forward(self, latents: Any, times: Any, **_: Any) -> tuple[torch.Tensor]:
            a = alphas[times.long()].sqrt().reshape(-1, 1, 1, 1)
            s = (1 - a**2).sqrt()
            noise = (latents - a * clean) / s
            return (noise if prediction_type == "epsilon" else a * noise - s * clean,)

    request = SamplingRequest(prompt="a cat", seed=3, num_inference_steps=steps)
    picture = sampling.start(model, request, sampling.schedules_of(model))
    text = sampling.text_rows(model, [request], {})
    while not picture.finished:
        advance(Knowing(), [picture], text)
    # The remaining noise is that of the last step's own noise level.
    assert float((picture.latents - clean).abs().max()) < 0.02


def test_a_sampled_picture_is_that_of_the_diffusers_pipeline(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(class_sampling, "NUM_INFERENCE_STEPS", 6)
    path = class_image_paths(task)[1]
    model = load(task.model_folder)
    pipeline = diffusers.StableDiffusionPipeline(
        vae=model.vae,
        text_encoder=model.text_encoder,
        tokenizer=model.tokenizer,
        unet=model.unet,
        scheduler=diffusers.DPMSolverMultistepScheduler.from_config(model.scheduler_config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    from dreambooth.data.class_images import derived_seed

    theirs = pipeline(
        "a photo of dog",
        num_inference_steps=6,
        guidance_scale=7.5,
        generator=torch.Generator("cpu").manual_seed(derived_seed(0, 0)),
        output_type="np",
    ).images[0]
    ours = np.asarray(Image.open(path)).astype(int)
    assert ours.std() > 5, "a flat picture proves nothing"
    assert np.abs(ours - (theirs * 255).round()).max() <= 2


def test_settings_of_another_solver_do_not_reach_this_one(make_model_folder: Folder) -> None:
    settings = {"algorithm_type": "sde-dpmsolver++", "solver_order": 3, "solver_type": "bh2"}
    model, _ = with_fast_solver(load(make_model_folder(scheduler_settings=settings)))
    config = models.sampling_scheduler(model).config
    assert (config.algorithm_type, config.solver_order, config.solver_type) == (
        "dpmsolver++",
        2,
        "midpoint",
    )
    assert config.beta_schedule == model.scheduler_config["beta_schedule"]


def test_a_noise_schedule_that_the_solver_does_not_know_keeps_its_own(
    small_model_folder: Path,
) -> None:
    model = load(small_model_folder)
    odd = {**model.scheduler_config, "beta_schedule": "sigmoid"}  # only DDPM knows this schedule
    model = dataclasses.replace(model, scheduler_class="DDPMScheduler", scheduler_config=odd)
    assert with_fast_solver(model) == (model, 50)


def test_a_short_noise_schedule_takes_no_more_steps_than_it_has(
    small_model_folder: Path,
) -> None:
    model = load(small_model_folder)
    short = {**model.scheduler_config, "num_train_timesteps": 10}
    assert with_fast_solver(dataclasses.replace(model, scheduler_config=short))[1] == 9


def test_the_batch_is_what_fits_beside_the_weights(task: Task) -> None:
    facts = read_facts(task.model_folder)
    weights = 4 * (facts.unet_parameters + facts.text_encoder_parameters + facts.vae_parameters)
    picture = 4 * 2 * expected_memory.ROW_TENSORS * facts.unet_layer_elements

    def on(pictures: float, wanted: int = 1) -> int:
        usable = usable_bytes(dataclasses.replace(gpu(2**34), free_bytes=None), 1)
        assert usable is not None
        overhead = 2**34 - usable
        device = gpu(int(overhead + weights + pictures * picture))
        plan = dataclasses.replace(task.plan, device=device, prior_generation_precision="no")
        settings = dataclasses.replace(task.hyperparameters, batch_size=wanted)
        return batch_size(dataclasses.replace(task, plan=plan, hyperparameters=settings))

    def gpu(memory_bytes: int) -> DeviceFacts:
        # Batches must not depend on the memory that is free now: a resumed job keeps its batches.
        return DeviceFacts(kind="cuda", name="", memory_bytes=memory_bytes, free_bytes=1)

    assert [on(n) for n in (0.5, 1.5, 3.5, 20.5)] == [1, 1, 3, 8]
    assert (on(20.5, wanted=12), on(5.5, wanted=12)) == (12, 5)
    assert batch_size(task) == 8


def bytes_for(task: Task, pictures: float) -> int:
    """Return the memory of a card on which `pictures` pictures fit into one call in fp32."""
    facts = read_facts(task.model_folder)
    weights = 4 * (facts.unet_parameters + facts.text_encoder_parameters + facts.vae_parameters)
    picture = 4 * 2 * expected_memory.ROW_TENSORS * facts.unet_layer_elements
    return int(OVERHEAD_BYTES + weights + pictures * picture)


def test_a_call_is_as_large_as_the_free_memory_or_the_cap_allows_from_the_first_on(
    task: Task, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    device = DeviceFacts(
        kind="cuda",
        name="",
        memory_bytes=bytes_for(task, 20.5),
        # From `device.from_torch`: what is free, or the fraction that this process may take.
        free_bytes=bytes_for(task, 2.5),
    )
    plan = dataclasses.replace(task.plan, device=device, prior_generation_precision="no")
    capped = dataclasses.replace(task, plan=plan)
    assert (batch_size(capped), pictures_per_call(capped)) == (8, 2)
    unknown = dataclasses.replace(device, free_bytes=None)
    plan = dataclasses.replace(plan, device=unknown)
    assert pictures_per_call(dataclasses.replace(task, plan=plan)) == 8
    assert pictures_per_call(task) == 8
    asked: list[int] = []

    def noted(unet: Any, pictures: Any, text: Any) -> None:
        asked.append(len(pictures))
        advance(unet, pictures, text)

    monkeypatch.setattr(sampling, "advance", noted)
    class_image_paths(capped)
    assert asked == [2] * 25 + [1] * 25  # three pictures
    assert "memory ran out" not in caplog.text


def test_running_out_of_memory_halves_the_batch_and_changes_no_picture(
    task: Task, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = [path.read_bytes() for path in class_image_paths(task)]
    shutil.rmtree(outputs.class_image_folder(task.environment))
    asked: list[int] = []

    def scarce(unet: Any, pictures: Any, text: Any) -> None:
        asked.append(len(pictures))
        if len(pictures) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        advance(unet, pictures, text)

    monkeypatch.setattr(sampling, "advance", scarce)
    room = 1
    paths = class_image_paths(task)
    assert asked[0] == 3
    assert set(asked[1:]) == {1}
    assert "memory ran out sampling 3 class images at once: now 1" in caplog.text
    for before, path in zip(whole, paths, strict=True):
        mine, other = (np.asarray(Image.open(p)).astype(int) for p in (path, as_file(before, path)))
        assert np.abs(mine - other).max() <= 2
    shutil.rmtree(outputs.class_image_folder(task.environment))
    room = 0
    with pytest.raises(ResourceError, match="sampling one class image: lower resolution"):
        class_image_paths(task)


def as_file(content: bytes, beside: Path) -> Path:
    path = beside.parent / "before.png"
    path.write_bytes(content)
    return path


class Memory:
    """Makes capturers and keeps a list of them."""

    def __init__(self) -> None:
        self.capturers: list[Recalls] = []

    def __call__(self, device: torch.device) -> Recalls:
        self.capturers.append(Recalls())
        return self.capturers[-1]


def fast(task: Task) -> Task:
    """Return the task with the fast step in its plan, as on CUDA."""
    return dataclasses.replace(task, plan=dataclasses.replace(task.plan, fast_step=True))


def sampled(task: Task, capture_on: Callable[[torch.device], Any]) -> list[bytes]:
    shutil.rmtree(outputs.class_image_folder(task.environment), ignore_errors=True)
    return [path.read_bytes() for path in class_image_paths(task, capture_on)]


class CapturesNothing(Recalls):
    """A capturer that always fails, so that the same calls are made without graphs."""

    def capture(self, call: Any) -> CapturedCall:
        raise RuntimeError("no graphs here")


def test_replayed_calls_sample_the_same_pictures_to_the_byte(
    task: Task, caplog: pytest.LogCaptureFixture
) -> None:
    memory = Memory()
    replayed = sampled(fast(task), memory)
    (capturer,) = memory.capturers
    assert (capturer.captured, capturer.replayed) == (1, 25)  # three pictures share all 25 calls
    assert caplog.messages == [m for m in caplog.messages if "CUDA graphs" not in m]
    assert sampled(fast(task), lambda device: CapturesNothing()) == replayed
    assert "called without CUDA graphs from now on" in caplog.text


def test_without_the_fast_step_nothing_is_captured_and_pictures_are_the_same(task: Task) -> None:
    memory = Memory()
    plain = sampled(task, memory)
    assert memory.capturers == []
    assert sampled(fast(task), memory) == plain
    assert len(memory.capturers) == 1


def test_out_of_memory_takes_the_graphs_memory_before_the_batch_is_halved(
    task: Task, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    memory = Memory()
    faults = [torch.OutOfMemoryError("CUDA out of memory")]

    def scarce(model: Any, latents: Any) -> Any:
        if faults:
            raise faults.pop()
        return decode(model, latents)

    monkeypatch.setattr(sampling, "decode", scarce)
    assert len(sampled(fast(task), memory)) == 4
    (capturer,) = memory.capturers
    assert capturer.forgotten == 1
    assert "from now on: memory ran out in sampling" in caplog.text
    assert "memory ran out sampling 3 class images at once: now 1" in caplog.text
