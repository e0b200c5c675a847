"""diffusers' pipeline corrects model folders of 2022; our pictures must equal the pipeline's."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from dreambooth.diffusion import model as models
from dreambooth.diffusion import sampling
from dreambooth.diffusion.sampling_request import SamplingRequest
from dreambooth.job.run import run_job
from dreambooth.model_folder import export, facts, layout
from dreambooth.model_folder.component_classes import SCHEDULERS

Make = Callable[..., Path]
CPU = torch.device("cpu")
PROMPT = "a photo of cat on the beach"

# Settings of a scheduler_config.json; None leaves a key out.
SAYINGS: dict[str, dict[str, Any]] = {
    "nothing": {"steps_offset": None, "clip_sample": None},
    "the numbers of 2022": {"steps_offset": 0, "clip_sample": True},
    "another offset": {"steps_offset": 7, "timestep_spacing": "leading"},
    "clip_sample is true": {"clip_sample": True, "timestep_spacing": "leading"},
}


def say(path: Path, **settings: Any) -> None:
    """Change keys of a JSON file; None removes a key."""
    content = json.loads(path.read_text("utf-8")) | settings
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def of_the_pipeline(folder: Path, **options: Any) -> np.ndarray:
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(5)
    made = pipeline(PROMPT, generator=generator, output_type="np", **options).images[0]
    return np.asarray((made * 255).round().astype("uint8"))


def of_ours(folder: Path, **options: Any) -> np.ndarray:
    model = models.load(folder, device=CPU)
    request = SamplingRequest(prompt=PROMPT, seed=5, **options)
    (picture,) = sampling.generate(model, [request])
    assert picture is not None
    assert picture.std() > 5, "a flat picture proves nothing"
    return picture


def largest_difference(a: np.ndarray, b: np.ndarray) -> int:
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b.astype(int)).max())


@pytest.mark.parametrize("saying", SAYINGS)
@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS))
def test_pictures_are_those_of_the_pipeline_whatever_the_folder_says(
    make_model_folder: Make, scheduler: str, saying: str
) -> None:
    folder = make_model_folder(scheduler=scheduler)
    say(folder / "scheduler" / "scheduler_config.json", **SAYINGS[saying])
    options = {"num_inference_steps": 6, "guidance_scale": 4.0}
    assert largest_difference(of_ours(folder, **options), of_the_pipeline(folder, **options)) <= 1


@pytest.mark.parametrize(
    ("version", "sample_size", "pixels"),
    [
        ("0.8.0", 12, 128),
        ("0.6.0.dev0", 32, 128),
        ("0.8", 63, 128),
        ("0.9.0.dev0", 12, 24),
        ("0.9.0", 12, 24),
        ("0.10.2", 12, 24),
        ("1.0.0", 12, 24),
        (None, 12, 24),
        ("0.8.0", 64, 128),
        ("0.8.0", 72, 144),
    ],
)
def test_the_resolution_is_that_of_the_pipeline(
    make_model_folder: Make, version: str | None, sample_size: int, pixels: int
) -> None:
    folder = make_model_folder()  # the VAE of this folder makes two pixels of each latent cell
    say(folder / "unet" / "config.json", _diffusers_version=version, sample_size=sample_size)
    assert facts.read_facts(folder).resolution == pixels
    options = {"num_inference_steps": 1, "guidance_scale": 1.0}
    ours = of_ours(folder, **options)
    assert ours.shape == (pixels, pixels, 3)
    assert largest_difference(ours, of_the_pipeline(folder, **options)) <= 1


def test_a_resolution_that_the_folder_names_itself_counts(make_model_folder: Make) -> None:
    folder = make_model_folder(model_info={"resolution": 48})
    say(folder / "unet" / "config.json", _diffusers_version="0.6.0")
    assert facts.read_facts(folder).resolution == 48


@pytest.mark.parametrize("version", ["", "none", 6, ["0", "8"], "9" * 5000])
def test_a_version_that_is_none_corrects_nothing(version: object) -> None:
    config = {"sample_size": 16, "_diffusers_version": version}
    assert layout.corrected(config, "unet") == config


def test_the_trained_model_says_the_corrected_numbers(
    make_model_folder: Make, tmp_path: Path
) -> None:
    base, out = make_model_folder(scheduler="DDIMScheduler"), tmp_path / "model"
    say(base / "unet" / "config.json", _diffusers_version="0.6.0")
    say(base / "scheduler" / "scheduler_config.json", **SAYINGS["nothing"])
    export.write(
        out,
        base_folder=base,
        trained=export.TrainedParts(unet=models.load(base, device=CPU).unet),
        resolution=128,
        card=card(),
        hyperparameters_json="{}",
    )
    assert layout.read_json(out / "unet" / "config.json")["sample_size"] == 64
    scheduler = layout.read_json(out / "scheduler" / "scheduler_config.json")
    assert (scheduler["steps_offset"], scheduler["clip_sample"]) == (1, False)
    options = {"num_inference_steps": 3, "guidance_scale": 4.0}
    before = of_ours(base, **options)
    for folder in (base, out):
        assert largest_difference(before, of_the_pipeline(folder, **options)) <= 1


def card() -> export.ModelCard:
    return export.ModelCard(
        base="base",
        instance_prompt=PROMPT,
        class_prompt=None,
        steps=1,
        planned_steps=1,
        instance_images=1,
        class_images=0,
        train_text_encoder=False,
        data_fingerprint="0",
        licence=None,
        versions=(),
    )


def test_a_full_size_network_that_says_a_miniatures_size_is_warned_of(
    make_model_folder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model_folder()
    assert facts.read_facts(folder).warnings == ()
    monkeypatch.setattr(facts, "_FULL_SIZE_PARAMETERS", 1000)
    (warning,) = facts.read_facts(folder).warnings
    assert "sample_size = 16, which makes pictures of 32 x 32 pixels" in warning
    assert "set sample_size to 64 or 96" in warning
    say(folder / "unet" / "config.json", _diffusers_version="0.8.0")
    assert facts.read_facts(folder).warnings == ()  # the loader has corrected it
    named = make_model_folder(model_info={"resolution": 32})
    assert facts.read_facts(named).warnings == ()


def test_a_job_and_generate_say_so(
    make_model_folder: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from PIL import Image

    from dreambooth import __main__ as cli

    monkeypatch.setattr(facts, "_FULL_SIZE_PARAMETERS", 1000)
    folder, photos = make_model_folder(), tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (40, 40), (200, 100, 50)).save(photos / "1.png")
    (photos / "dataset_info.json").write_text(json.dumps({"instance_prompt": PROMPT}))
    argv = [f"--pretrained-model={folder}", f"--train={photos}", "--dry-run"]
    argv += [f"--model_dir={tmp_path / 'model'}"]
    assert run_job(argv, {}) == 0
    assert capsys.readouterr().err.count("says sample_size = 16") == 1
    assert run_job([*argv, "--resolution=64"], {}) == 0
    assert "says sample_size" not in capsys.readouterr().err
    words = ["generate", f"--model={folder}", "--prompt=x", f"--out={tmp_path}", "--steps=1"]
    assert cli.main(words) == 0
    assert capsys.readouterr().err.count("says sample_size = 16") == 1
