from __future__ import annotations

import json
import logging
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline

from dreambooth.diffusion import model as models
from dreambooth.diffusion.decoding import decode
from dreambooth.diffusion.model import DiffusionModel
from dreambooth.errors import ModelArtifactError
from dreambooth.model_folder.component_classes import SCHEDULERS

Make = Callable[..., Path]
CPU = torch.device("cpu")
LAYOUTS = [
    {},
    {"sharded": True},
    {"variant": "fp16"},
    {"variant": "fp16", "sharded": True},
    {"bin": True},
    {"bin": True, "sharded": True},
    {"bin": True, "variant": "fp16"},
    {"old_vae_names": True},
    {"text_model_prefix": False},
    {"use_linear_projection": False},
    {"prediction_type": "v_prediction", "pixels": 64},
    {
        "prediction_type": "sample",
        "scheduler": "DDIMScheduler",
    },  # cannot be trained, but can be drawn with
]


@pytest.fixture(scope="module")
def model(small_model_folder: Path) -> DiffusionModel:
    return models.load(small_model_folder, device=CPU)


def pipeline(folder: Path, **options: Any) -> Any:
    return StableDiffusionPipeline.from_pretrained(
        folder, safety_checker=None, dtype=torch.float32, local_files_only=True, **options
    )


def change(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text("utf-8")) | values
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
def test_every_layout_loads_to_the_weights_that_the_library_loads(
    make_model_folder: Make, options: dict[str, Any]
) -> None:
    folder = make_model_folder(**options)
    model = models.load(folder, device=CPU)
    ours = {part: getattr(model, part).state_dict() for part in ("unet", "vae", "text_encoder")}
    theirs = pipeline(
        folder, variant=options.get("variant"), use_safetensors=not options.get("bin")
    )
    for part, state in ours.items():
        expected = getattr(theirs, part).state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in state)
        assert all(value.dtype == torch.float32 for value in state.values())
        assert not any(p.requires_grad for p in getattr(model, part).parameters())
        assert not getattr(model, part).training
    assert model.resolution == options.get("pixels", 32)
    assert model.prediction_type == options.get("prediction_type", "epsilon")


def test_a_loop_of_links_inside_a_part_is_never_walked(make_model_folder: Make) -> None:
    folder = make_model_folder()
    (folder / "unet" / "loop").symlink_to("..")
    assert models.load(folder, device=CPU).resolution == 32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_can_be_loaded_in_half(small_model_folder: Path, dtype: torch.dtype) -> None:
    model = models.load(small_model_folder, device=CPU, dtype=dtype)
    assert {p.dtype for p in model.unet.parameters()} == {dtype}


def test_loading_leaves_the_random_state_alone(small_model_folder: Path) -> None:
    before = torch.random.get_rng_state()
    models.load(small_model_folder, device=CPU)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_no_network_is_asked(small_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_: object) -> None:
        raise AssertionError("a local folder must not open a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    models.load(small_model_folder, device=CPU)


def test_text_is_encoded_as_the_pipeline_does(
    model: DiffusionModel, small_model_folder: Path
) -> None:
    prompts = ["a photo of a riobugger cat", "", "Äpfel! 猫 a cat" * 9]
    ids = models.tokenize(model, prompts)
    assert ids.shape == (3, 32)
    assert ids.dtype == torch.int64
    theirs = pipeline(small_model_folder)
    expected, _ = theirs.encode_prompt(prompts, CPU, 1, False)
    assert torch.equal(models.encode_text(model, ids), expected)
    assert not models.encode_text(model, ids).requires_grad


def test_padding_is_the_base_models_own(model: DiffusionModel) -> None:
    # Stable Diffusion 2.1 base pads with '!', which only special_tokens_map.json states.
    assert models.tokenize(model, [""])[0, -1] == 0


def test_the_attention_mask_is_used_where_the_model_says_so(make_model_folder: Make) -> None:
    folder = make_model_folder()
    change(folder / "text_encoder" / "config.json", use_attention_mask=True)
    model = models.load(folder, device=CPU)
    prompts = ["a cat", "a photo of a dog on the beach", "cat " * 50]
    expected, _ = pipeline(folder).encode_prompt(prompts, CPU, 1, False)
    assert torch.equal(models.encode_text(model, models.tokenize(model, prompts)), expected)


def test_a_prompt_that_is_cut_is_reported(
    model: DiffusionModel, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        models.tokenize(model, ["a cat " * 15])
        models.tokenize(model, ["a photo of a riobugger cat on the beach"])
    assert not caplog.records
    models.tokenize(model, ["a cat " * 16, "a photo of a cat", "a dog " * 1000])
    assert caplog.text.count("longer than the 32 tokens") == 2
    assert len(caplog.text) < 800  # the prompts themselves are not logged in full
    for _ in range(3):  # repeated prompts are not warned of again
        models.tokenize(model, ["a cat " * 16])
    assert caplog.text.count("longer than the 32 tokens") == 2


def test_the_text_encoder_can_be_trained(small_model_folder: Path) -> None:
    model = models.load(small_model_folder, device=CPU)
    model.text_encoder.requires_grad_(True)
    features = models.text_features(model, models.tokenize(model, ["a cat"]))
    features.sum().backward()
    grads = [p.grad for p in model.text_encoder.parameters()]
    assert all(grad is not None for grad in grads)


def test_the_posterior_is_the_vaes_and_unscaled(model: DiffusionModel) -> None:
    pixels = torch.rand(2, 3, 32, 24) * 2 - 1
    mean, std = models.encode_posterior(model, pixels)
    posterior = model.vae.encode(pixels).latent_dist
    assert mean.shape == std.shape == (2, 4, 16, 12)
    assert torch.equal(mean, posterior.mean)
    assert torch.equal(std, posterior.std)
    assert bool((std > 0).all())


def test_latents_are_decoded_as_the_pipeline_does(
    model: DiffusionModel, small_model_folder: Path
) -> None:
    latents = torch.randn(2, 4, 16, 12)
    picture = decode(model, latents)
    assert picture is not None
    assert picture.shape == (2, 32, 24, 3)
    assert picture.dtype == np.uint8
    theirs = pipeline(small_model_folder)
    decoded = theirs.vae.decode(latents / theirs.vae.config.scaling_factor)[0].detach()
    expected = theirs.image_processor.postprocess(decoded, output_type="np")
    assert np.array_equal(picture, (expected * 255).round().astype("uint8"))


def test_latents_that_are_not_finite_are_no_picture(model: DiffusionModel) -> None:
    assert decode(model, torch.full((1, 4, 8, 8), float("nan"))) is None


@torch.inference_mode()
def test_a_vae_that_overflows_in_half_precision_is_asked_in_float32(
    small_model_folder: Path,
) -> None:
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    model = models.load(small_model_folder, device=CPU, dtype=torch.float16)
    last = model.vae.decoder.conv_out
    last.weight *= 1e4
    last.bias.fill_(6e4)
    picture = decode(model, latents)
    assert picture is not None
    assert picture.any()
    assert model.vae.dtype == torch.float16, "the model stays as it was"
    expected = decode(model.to(dtype=torch.float32, parts=["vae"]), latents)
    assert np.array_equal(picture, expected)
    last.bias.fill_(float("nan"))
    assert decode(model, latents) is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised by numpy inside diffusers
@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_the_folders_own_noise_scheduler_is_made(make_model_folder: Make, name: str) -> None:
    folder = make_model_folder(scheduler=name, prediction_type="v_prediction")
    if name == "LMSDiscreteScheduler" and find_spec("scipy") is None:
        with pytest.raises(ModelArtifactError, match="scipy"):
            models.load(folder, device=CPU)
        return
    model = models.load(folder, device=CPU)
    scheduler = models.sampling_scheduler(model)
    assert type(scheduler).__name__ == name
    assert scheduler is not models.sampling_scheduler(model)
    training = models.training_noise_scheduler(model)
    assert type(training) is DDPMScheduler
    assert training.config.prediction_type == "v_prediction"
    assert torch.equal(training.betas, scheduler.betas)
    assert training.betas[-1] == pytest.approx(0.012)


def test_parts_move_one_by_one(small_model_folder: Path) -> None:
    model = models.load(small_model_folder, device=CPU)
    model.to(dtype=torch.float64, parts=("vae",))
    model.to("meta", parts=("text_encoder",))
    assert model.vae.dtype == torch.float64
    assert model.text_encoder.device.type == "meta"
    assert (model.unet.dtype, model.device) == (torch.float32, CPU)


BROKEN: list[tuple[str, dict[str, Any], str]] = [
    ("unet/config.json", {"block_out_channels": [32, 96]}, "shape"),
    ("unet/config.json", {"block_out_channels": "wide"}, "cannot be built|network"),
    ("unet/config.json", {"down_block_types": ["EvilBlock", "DownBlock2D"]}, "EvilBlock|network"),
    ("unet/config.json", {"norm_num_groups": 0}, "network"),
    ("unet/config.json", {"addition_embed_type": "text"}, "lacks add_embedding"),
    ("unet/config.json", {"in_channels": 9, "out_channels": 9}, "shape"),
    ("unet/config.json", {"cross_attention_dim": 64}, "shape"),
    ("vae/config.json", {"layers_per_block": 2}, "lacks"),
    ("vae/config.json", {"use_quant_conv": False}, "foreign"),
    ("text_encoder/config.json", {"num_hidden_layers": 1}, "foreign text_model.encoder.layers.1"),
    ("text_encoder/config.json", {"num_hidden_layers": 3}, "lacks"),
    ("text_encoder/config.json", {"hidden_size": "32"}, "network"),
    ("text_encoder/config.json", {"vocab_size": 10**7}, "shape"),
    ("text_encoder/config.json", {"max_position_embeddings": 10**9}, "max_position_embeddings"),
    ("scheduler/scheduler_config.json", {"beta_schedule": "mine"}, "scheduler_config"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**12}, "scheduler_config"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": "many"}, "scheduler_config"),
    ("tokenizer/tokenizer_config.json", {"model_max_length": "long"}, "tokenizer"),
]


@pytest.mark.parametrize(("file", "values", "message"), BROKEN, ids=str)
def test_parts_that_do_not_belong_together_are_refused(
    make_model_folder: Make, file: str, values: dict[str, Any], message: str
) -> None:
    folder = make_model_folder()
    change(folder / file, **values)
    with pytest.raises(ModelArtifactError, match=message) as caught:
        models.load(folder, device=CPU)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_with_more_words_than_the_text_encoder_is_refused(
    make_model_folder: Make,
) -> None:
    folder = make_model_folder()
    vocabulary = json.loads((folder / "tokenizer" / "vocab.json").read_text("utf-8"))
    vocabulary["new"] = len(vocabulary)
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    with pytest.raises(ModelArtifactError, match="561 tokens, and the text encoder 560"):
        models.load(folder, device=CPU)


def test_nothing_is_imported_from_a_folder(
    make_model_folder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model_folder()
    mark = tmp_path / "imported"
    for place in (folder / "unet" / "evil.py", folder / "pipeline.py"):
        place.write_text(f"open({str(mark)!r}, 'w')")
    change(folder / "model_index.json", unet=["evil", "UNet2DConditionModel"])
    with pytest.raises(ModelArtifactError):
        models.load(folder, device=CPU)
    assert not mark.exists()
