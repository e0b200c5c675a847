from __future__ import annotations

import contextlib
import inspect
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from transformers import CLIPTextConfig

from dreambooth.diffusion import model as models
from dreambooth.diffusion import sampling, trial
from dreambooth.diffusion.sampling_request import SamplingRequest
from dreambooth.errors import ModelArtifactError
from dreambooth.model_folder.component_classes import SCHEDULERS

Make = Callable[..., Path]
CPU = torch.device("cpu")
VARIANTS = 16

# Settings with which everything is built, and nothing can be drawn or trained.
BUILT: list[tuple[str, dict[str, Any]]] = [
    ("unet", {"class_embed_type": "identity"}),
    ("unet", {"center_input_sample": "x", "norm_num_groups": 8, "resnet_time_scale_shift": "x"}),
    ("text_encoder", {"attention_dropout": "much"}),
    ("text_encoder", {"layer_norm_eps": "small"}),
    ("scheduler", {"beta_start": 5}),
    ("scheduler", {"beta_start": -1, "beta_end": -1}),
    ("scheduler", {"num_train_timesteps": 1}),
    ("scheduler", {"set_alpha_to_one": True, "prediction_type": "sample"}),
    ("scheduler", {"_class_name": "EulerDiscreteScheduler", "interpolation_type": "cubic"}),
    ("scheduler", {"_class_name": "EulerDiscreteScheduler", "final_sigmas_type": "none"}),
    ("scheduler", {"_class_name": "DPMSolverMultistepScheduler", "solver_order": "two"}),
    ("scheduler", {"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": "x"}),
    ("scheduler", {"_class_name": "UniPCMultistepScheduler", "disable_corrector": 7}),
    ("scheduler", {"_class_name": "HeunDiscreteScheduler", "use_karras_sigmas": [[]]}),
]
ODD: tuple[Any, ...] = (
    *(None, "", "text", "1000", -1, 0, 1, 3, -(10**9), 10**9, 10**20, 10**99, 1.5, -0.5, 1e300),
    *(float("nan"), float("inf"), True, False, [], {}, [1], [1, 2], ["x"], [[1, [10**6]]]),
    *({"a": 1}, [10**9] * 2, "a" * 5000, "\n\x1b[31m"),
)


def change(folder: Path, part: str, values: dict[str, Any]) -> None:
    if part == "scheduler" and "_class_name" in values:
        index = folder / "model_index.json"
        named = {"scheduler": ["diffusers", values["_class_name"]]}
        index.write_text(json.dumps(json.loads(index.read_text("utf-8")) | named))
    path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values))


@pytest.mark.parametrize(("part", "values"), BUILT, ids=str)
def test_what_can_be_built_and_not_used_is_refused_when_it_is_loaded(
    make_model_folder: Make, part: str, values: dict[str, Any]
) -> None:
    folder = make_model_folder()
    change(folder, part, values)
    with pytest.raises(ModelArtifactError, match=part) as caught:
        models.load(folder, device=CPU)
    assert str(caught.value).isprintable()


def _settings(scheduler: str) -> dict[str, list[str]]:
    """Return the names of the settings that the libraries read, by part."""
    made = {
        "unet": diffusers.UNet2DConditionModel,
        "vae": diffusers.AutoencoderKL,
        "scheduler": getattr(diffusers, scheduler),
    }
    names = {part: list(inspect.signature(each.__init__).parameters) for part, each in made.items()}
    return names | {"text_encoder": [*CLIPTextConfig().to_dict(), "num_labels", "dtype"]}


@pytest.mark.filterwarnings("ignore")
def test_any_odd_setting_is_refused_when_it_is_loaded_or_draws_and_trains(
    small_model_folder: Path, tmp_path: Path
) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    draws = random.Random(seed)
    for _ in range(VARIANTS):
        scheduler = draws.choice(sorted(SCHEDULERS))
        part, names = draws.choice(list(_settings(scheduler).items()))
        values = {draws.choice(names): draws.choice(ODD)}
        if part == "scheduler":
            values = {"_class_name": scheduler, **values}
        print(part, str(values)[:100])
        folder = tmp_path / "odd"
        shutil.copytree(small_model_folder, folder)
        change(folder, part, values)
        model = None
        with contextlib.suppress(ModelArtifactError):
            model = models.load(folder, device=CPU)
        if model is not None:
            _draw_and_train(model)
        shutil.rmtree(folder)


def _draw_and_train(model: models.DiffusionModel) -> None:
    requests = [
        SamplingRequest(prompt="a cat", seed=1, num_inference_steps=steps, width=16, height=16)
        for steps in (2, 5)
        if steps <= sampling.sampling_facts(model).max_steps
    ]
    for picture in sampling.generate(model, requests):
        assert picture is None or picture.shape == (16, 16, 3)  # None: not finite
    models.encode_posterior(model, torch.zeros(1, 3, 16, 16))
    noise_scheduler = models.training_noise_scheduler(model)
    timesteps = torch.tensor([0, noise_scheduler.config.num_train_timesteps - 1])
    latents = torch.zeros(2, model.latent_channels, 8, 8)
    assert bool(noise_scheduler.add_noise(latents, latents, timesteps).isfinite().all())


def test_memory_that_runs_out_on_a_gpu_is_no_fault_of_the_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A server tries a model again that did not fit, and gives up one that is faulty."""
    for has_gpu, expected in ((True, RuntimeError), (False, ModelArtifactError)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        with pytest.raises(expected), trial.faults_of(Path("config.json"), "text encoder"):
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")
