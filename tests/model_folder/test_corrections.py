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
from PIL import Image

from dreambooth import __main__ as cli
from dreambooth.diffusion import model as models
from dreambooth.diffusion import sampling
from dreambooth.diffusion.sampling_request import SamplingRequest
from dreambooth.job.run import run_job
from dreambooth.model_folder import export, facts, layout, pipeline_settings
from dreambooth.model_folder.taught_subjects import TaughtSubject

Make = Callable[..., Path]
CPU = torch.device("cpu")
PROMPT = "a photo of cat on the beach"


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


def test_a_resolution_that_the_folder_names_itself_counts(make_model_folder: Make) -> None:
    folder = make_model_folder(model_info={"resolution": 48})
    say(folder / "unet" / "config.json", _diffusers_version="0.6.0")
    assert facts.read_facts(folder).resolution == 48


@pytest.mark.parametrize("version", ["", "none", 6, ["0", "8"], "9" * 5000])
def test_a_version_that_is_none_corrects_nothing(version: object) -> None:
    config = {"sample_size": 16, "_diffusers_version": version}
    assert pipeline_settings.corrected(config, "unet") == config


def test_the_trained_model_says_the_corrected_numbers(
    make_model_folder: Make, tmp_path: Path
) -> None:
    base, out = make_model_folder(scheduler="DDIMScheduler"), tmp_path / "model"
    say(base / "unet" / "config.json", _diffusers_version="0.6.0")
    say(base / "scheduler" / "scheduler_config.json", steps_offset=None, clip_sample=None)
    write(out, base, 128)
    assert layout.read_json(out / "unet" / "config.json")["sample_size"] == 64
    scheduler = layout.read_json(out / "scheduler" / "scheduler_config.json")
    assert (scheduler["steps_offset"], scheduler["clip_sample"]) == (1, False)
    options = {"num_inference_steps": 3, "guidance_scale": 4.0}
    before = of_ours(base, **options)
    for folder in (base, out):
        assert largest_difference(before, of_the_pipeline(folder, **options)) <= 1


@pytest.mark.parametrize("version", [None, "0.6.0", "0.42.1"])
@pytest.mark.parametrize("resolution", [24, 52, 128])
def test_plain_diffusers_draws_at_the_trained_resolution(
    make_model_folder: Make, tmp_path: Path, version: str | None, resolution: int
) -> None:
    base, out = make_model_folder(), tmp_path / "model"
    say(base / "unet" / "config.json", _diffusers_version=version)
    write(out, base, resolution)
    side = resolution // 8 * 8
    options = {"num_inference_steps": 1, "guidance_scale": 1.0}
    drawn = of_the_pipeline(out, **options)
    assert drawn.shape == (side, side, 3)
    assert largest_difference(of_ours(out, **options), drawn) <= 1
    (out / "__model_info__.json").unlink()
    assert facts.read_facts(out).resolution == side


def test_the_configuration_of_a_model_trained_at_its_own_resolution_stays(
    make_model_folder: Make, tmp_path: Path
) -> None:
    base, out = make_model_folder(), tmp_path / "model"
    write(out, base, 32)
    read = [layout.read_json(folder / "unet" / "config.json") for folder in (base, out)]
    assert read[0] == read[1]


def write(out: Path, base: Path, resolution: int) -> None:
    export.write(
        out,
        base_folder=base,
        trained=export.TrainedParts(unet=models.load(base, device=CPU).unet),
        resolution=resolution,
        card=card(),
        hyperparameters_json="{}",
    )


def card() -> export.ModelCard:
    return export.ModelCard(
        base="base",
        subjects=[TaughtSubject(instance_prompt=PROMPT)],
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
    monkeypatch.setattr(facts, "_FULL_SIZE_PARAMETERS", 1000)
    folder = make_model_folder()
    argv = [*job(folder, tmp_path), "--dry-run"]
    assert run_job(argv, {}) == 0
    assert capsys.readouterr().err.count("says sample_size = 16") == 1
    assert run_job([*argv, "--resolution=64"], {}) == 0
    assert "says sample_size" not in capsys.readouterr().err
    words = ["generate", f"--model={folder}", "--prompt=x", f"--out={tmp_path}", "--steps=1"]
    assert cli.main(words) == 0
    assert capsys.readouterr().err.count("says sample_size = 16") == 1


def test_a_job_and_generate_refuse_what_is_drawn_otherwise_before_anything_else(
    make_model_folder: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_model_folder()
    say(folder / "unet" / "config.json", time_cond_proj_dim=32)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")
    told = "config.json says time_cond_proj_dim = 32: this U-Net wants more than noise, time and"
    for argv in (job(folder, tmp_path), [*job(folder, tmp_path), "--dry-run"]):
        assert run_job(argv, {}) == 1
        assert capsys.readouterr().err.count(told) == 1
    words = ["generate", f"--model={folder}", "--prompt=x", f"--out={tmp_path}", "--steps=1"]
    assert cli.main(words) == 1
    assert capsys.readouterr().err.count(told) == 1


def job(model: Path, folder: Path) -> list[str]:
    """Return the arguments of a training job with one picture, which lies in `folder`."""
    photos = folder / "photos"
    photos.mkdir(exist_ok=True)
    Image.new("RGB", (40, 40), (200, 100, 50)).save(photos / "1.png")
    (photos / "dataset_info.json").write_text(json.dumps({"instance_prompt": PROMPT}))
    return [
        *(f"--pretrained-model={model}", f"--train={photos}"),
        *(f"--model_dir={folder / 'model'}", f"--output_data_dir={folder / 'data'}"),
    ]
