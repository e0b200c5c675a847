"""Our pictures are those of diffusers' pipeline, whatever the folder says, or it is refused.

Every test changes the embedded model's folder by a random generator, in many ways of one kind, and
draws with both. A failure names kind and seed; `assert_same(kind, seed, folder)` repeats it.
"""

from __future__ import annotations

import filecmp
import functools
import inspect
import json
import logging
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dreambooth import tiny
from dreambooth.diffusion import model as models
from dreambooth.diffusion import sampling, sampling_request
from dreambooth.diffusion.sampling_request import SamplingRequest
from dreambooth.errors import ModelArtifactError
from dreambooth.model_folder.component_classes import SCHEDULERS

ABSENT = object()  # in place of a value: the key is left out
PROMPT = "a photo of a red ball on the beach"

# Settings of noise schedulers: these two are tried with all, the others with those that know them.
CORRECTED: dict[str, list[Any]] = {
    "steps_offset": [ABSENT, 0, 1, 7],
    "clip_sample": [ABSENT, True, False],
}
NOISE_SCHEDULER: dict[str, list[Any]] = {
    "_use_default_values": [["steps_offset"], ["clip_sample", "beta_end"], ["prediction_type"]],
    "_class_name": [ABSENT, "DDIMScheduler", "PNDMScheduler"],
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2"],
    "beta_start": [1e-4, 0.00085, 0.002],
    "beta_end": [0.012, 0.02, 0.03],
    "num_train_timesteps": [37, 100, 500, 999, 1001],
    "trained_betas": [[0.001 + 2e-5 * step for step in range(1001)]],  # fewer are refused
    "prediction_type": ["epsilon", "v_prediction", "v_prediction", "sample"],
    "timestep_spacing": ["leading", "linspace", "trailing"],
    "set_alpha_to_one": [True, False],
    "skip_prk_steps": [ABSENT, False, True],
    "clip_sample_range": [1.0, 2.0],
    "thresholding": [True],
    "dynamic_thresholding_ratio": [0.9],
    "sample_max_value": [1.0, 2.0],
    "rescale_betas_zero_snr": [True, False],
    "variance_type": ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"],
    "solver_order": [1, 2, 3],
    "algorithm_type": ["dpmsolver", "dpmsolver++", "sde-dpmsolver++"],
    "solver_type": ["midpoint", "heun", "logrho", "bh1", "bh2"],
    "lower_order_final": [True, False],
    "euler_at_final": [True, False],
    "use_karras_sigmas": [True],
    "use_exponential_sigmas": [True],
    "use_beta_sigmas": [True],
    "use_lu_lambdas": [True],
    "final_sigmas_type": ["zero", "sigma_min"],
    "lambda_min_clipped": [-5.1],
    "interpolation_type": ["linear", "log_linear"],
    "timestep_type": ["discrete", "continuous"],
    "sigma_min": [0.05],
    "sigma_max": [10.0],
    "predict_x0": [True, False],
    "disable_corrector": [[], [0], [0, 1]],
}
UNET: dict[str, list[Any]] = {
    "conv_in_kernel": [1, 5],
    "conv_out_kernel": [1, 5],
    "act_fn": ["gelu", "mish", "relu"],
    "resnet_time_scale_shift": ["scale_shift"],
    "resnet_skip_time_act": [True],
    "resnet_out_scale_factor": [1.4],
    "time_embedding_type": ["fourier"],
    "time_embedding_dim": [80],
    "time_embedding_act_fn": ["silu", "gelu"],
    "timestep_post_act": ["silu"],
    "freq_shift": [1],
    "flip_sin_to_cos": [False],
    "center_input_sample": [True],
    "mid_block_scale_factor": [1.5],
    "mid_block_type": [None, "UNetMidBlock2D", "UNetMidBlock2DSimpleCrossAttn"],
    "dropout": [0.3],
    "norm_eps": [1e-3],
    "norm_num_groups": [8],
    "transformer_layers_per_block": [2, [1, 2]],
    "layers_per_block": [2, [1, 2]],
    "attention_head_dim": [8, [2, 4]],
    "use_linear_projection": [True],
    "upcast_attention": [True],
    "attention_type": ["gated"],
    "only_cross_attention": [True, [True, False]],
    "cross_attention_norm": ["layer_norm"],
    "cross_attention_dim": [[96, 96], 48],
    "encoder_hid_dim": [96],
    "addition_embed_type_num_heads": [4],
    "addition_embed_type": ["text"],
    "block_out_channels": [[32, 64]],
    "_use_default_values": [["act_fn"], ["norm_eps", "dropout"]],
}
VAE: dict[str, list[Any]] = {
    "scaling_factor": [0.3, 1, ABSENT],
    "shift_factor": [0.3],
    "latents_mean": [[0.1, 0.2, 0.3, 0.4]],
    "latents_std": [[2.0, 2.0, 2.0, 2.0]],
    "force_upcast": [False, True],
    "use_quant_conv": [False],
    "use_post_quant_conv": [False],
    "mid_block_add_attention": [False],
    "act_fn": ["gelu", "mish"],
    "norm_num_groups": [4],
    "layers_per_block": [2],
    "sample_size": [32, 1024],
    "up_block_types": [["UpDecoderBlock2D", "UpDecoderBlock2D", "AttnUpDecoderBlock2D"]],
    "_use_default_values": [["scaling_factor"], ["act_fn", "force_upcast"]],
}
TEXT_ENCODER: dict[str, list[Any]] = {
    "hidden_act": ["gelu", "relu"],
    "layer_norm_eps": [1e-2],
    "num_attention_heads": [2, 8],
    "attention_dropout": [0.4],
    "eos_token_id": [2, 648],
    "pad_token_id": [0, 1],
    "projection_dim": [64],
    "output_hidden_states": [True],
    "use_attention_mask": [True, False],
    "vocab_size": [649, 700],
    "_attn_implementation": ["eager"],
    "_use_default_values": [["hidden_act"]],
}
TOKENIZER: dict[str, list[Any]] = {
    "model_max_length": [8, 16, 31],
    "padding_side": ["left", "right"],
    "truncation_side": ["left", "right"],
    "add_prefix_space": [True],
    "do_lower_case": [False],
    "tokenizer_class": ["CLIPTokenizerFast", ABSENT],
    "model_input_names": [["input_ids"]],
}
VERSIONS = (
    *("0.2.2", "0.6.0.dev0", "0.8", "0.8.9.rc1", "v0.8.0", " 0.8.0", "0!0.8.0", "0", "00.08"),
    *("0.9.0.dev0", "0.10.2", "0.80.0", "1.0.0", "1!0.2.0"),
)


def say(path: Path, **settings: Any) -> None:
    """Change keys of a JSON file; ABSENT removes a key."""
    content = json.loads(path.read_text("utf-8")) | settings
    content = {key: value for key, value in content.items() if value is not ABSENT}
    path.write_text(json.dumps(content))


def some_of(rng: random.Random, table: dict[str, list[Any]], most: int) -> dict[str, Any]:
    return {
        name: rng.choice(table[name]) for name in rng.sample(sorted(table), rng.randint(1, most))
    }


def fit_weights(file: Path, module: torch.nn.Module, prefix: str = "") -> None:
    """Write the weights of a module of changed settings; those that still fit stay the same."""
    old, new = load_file(file), module.state_dict()
    for key, tensor in new.items():
        kept = old.get(prefix + key)
        new[key] = tensor if kept is None or kept.shape != tensor.shape else kept.float()
    state = {prefix + key: tensor.contiguous().clone() for key, tensor in new.items()}
    save_file(state, file, {"format": "pt"})


def of_a_scheduler(rng: random.Random, folder: Path, name: str) -> dict[str, Any]:
    known = inspect.signature(getattr(diffusers, name).__init__).parameters
    table = {k: v for k, v in NOISE_SCHEDULER.items() if k in known or k.startswith("_")}
    settings = {"_class_name": name, **some_of(rng, table, 3)}
    settings |= {key: rng.choice(values) for key, values in CORRECTED.items()}
    say(folder / "scheduler" / "scheduler_config.json", **settings)
    say(folder / "model_index.json", scheduler=["diffusers", name])
    return settings | {"eta": rng.choice([0.0, 0.0, 0.5])}


def of_the_unet(rng: random.Random, folder: Path) -> dict[str, Any]:
    settings = some_of(rng, UNET, 3)
    say(folder / "unet" / "config.json", **settings)
    config = json.loads((folder / "unet" / "config.json").read_text())
    unet = diffusers.UNet2DConditionModel.from_config(config)
    fit_weights(folder / "unet" / "diffusion_pytorch_model.safetensors", unet)
    return settings


def of_the_vae(rng: random.Random, folder: Path) -> dict[str, Any]:
    settings = some_of(rng, VAE, 3)
    say(folder / "vae" / "config.json", **settings)
    config = json.loads((folder / "vae" / "config.json").read_text())
    vae = diffusers.AutoencoderKL.from_config(config)
    fit_weights(folder / "vae" / "diffusion_pytorch_model.safetensors", vae)
    return settings


def of_the_resolution(rng: random.Random, folder: Path) -> dict[str, Any]:
    settings = {
        "_diffusers_version": rng.choice(VERSIONS),
        "sample_size": rng.choice([4, 12, 16, 20, 62, 66]),
    }
    say(folder / "unet" / "config.json", **settings)
    return settings | {"num_inference_steps": 1}


def say_of_the_text_encoder(folder: Path, **settings: Any) -> None:
    say(folder / "text_encoder" / "config.json", **settings)
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    text_encoder = CLIPTextModel(CLIPTextConfig.from_dict(config))
    fit_weights(folder / "text_encoder" / "model.safetensors", text_encoder, "text_model.")


def of_the_text(rng: random.Random, folder: Path) -> dict[str, Any]:
    settings = some_of(rng, TEXT_ENCODER, 3)
    say_of_the_text_encoder(folder, **settings)
    if rng.random() < 0.7:
        tokenizer = some_of(rng, TOKENIZER, 2)
        say(folder / "tokenizer" / "tokenizer_config.json", **tokenizer)
        settings |= tokenizer
    if rng.random() < 0.3:
        settings["pad_token"] = rng.choice(["!", "<|endoftext|>", "<|startoftext|>"])
        say(folder / "tokenizer" / "special_tokens_map.json", pad_token=settings["pad_token"])
    words = [*PROMPT.split(), "<|endoftext|>", "<|startoftext|>", "!", "CAT", "été", "猫"]
    prompt = " ".join(rng.choices(words, k=rng.choice([0, 3, 8, 50])))
    return settings | {"prompt": prompt, "negative_prompt": rng.choice(["", "a <|endoftext|> !"])}


def of_added_tokens(rng: random.Random, folder: Path) -> dict[str, Any]:
    """Add tokens of one or more vectors, in one of the three ways that folders say so."""
    names = rng.sample(["<thing>", "<Cat>", "dog", "my thing", "*", "a_1", "été", "<|x|>"], 3)
    added = [
        n for n in names for n in (n, *(f"{n}_{i}" for i in range(1, rng.choice([1, 2, 3, 40]))))
    ]
    rng.shuffle(added)
    first = 649
    say_of_the_text_encoder(folder, vocab_size=first + len(added))
    numbered = {name: first + i for i, name in enumerate(added)}
    how = rng.choice(["added_tokens.json", "added_tokens_decoder", "save_pretrained"])
    if how == "added_tokens.json":
        (folder / "tokenizer" / how).write_text(json.dumps(numbered))
    elif how == "added_tokens_decoder":
        flags = {
            flag: rng.random() < 0.3
            for flag in ("lstrip", "rstrip", "normalized", "single_word", "special")
        }
        decoder = {str(number): {"content": n, **flags} for n, number in numbered.items()}
        say(folder / "tokenizer" / "tokenizer_config.json", added_tokens_decoder=decoder)
    else:
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        tokenizer.add_tokens(added)
        shutil.rmtree(folder / "tokenizer")
        tokenizer.save_pretrained(folder / "tokenizer")
    words = [
        "a",
        "photo",
        "of",
        "and",
        "dogs,",
        "(<thing>)",
        "<cat>",
        *names,
        *rng.sample(added, 1),
    ]
    return {
        "how": how,
        "added": added,
        "prompt": " ".join(rng.sample(words, 6)),
        "negative_prompt": " ".join(rng.sample(words, 3)),
    }


def of_several_copies(rng: random.Random, folder: Path) -> dict[str, Any]:
    """Write different weights under two or three of the names that one part's weights may have."""
    part = rng.choice(["unet", "vae", "text_encoder"])
    stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
    plain = folder / part / f"{stem}.safetensors"
    weights = {key: tensor.float() for key, tensor in load_file(plain).items()}
    plain.unlink()
    forms = rng.sample(["", ".fp16", ".fp32", "shards", "bin", ".fp16 bin"], rng.choice([2, 3]))
    for number, form in enumerate(forms):
        copy = {key: each * 0.7**number if each.ndim > 1 else each for key, each in weights.items()}
        if "16" in form:
            copy = {key: tensor.half() for key, tensor in copy.items()}
        if form.endswith("bin"):
            pickled = "pytorch_model" if stem == "model" else stem
            torch.save(copy, folder / part / f"{pickled}{form.removesuffix('bin').strip()}.bin")
        elif form == "shards":
            shard = f"{stem}-00001-of-00001.safetensors"
            save_file(copy, folder / part / shard, {"format": "pt"})
            index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(copy, shard)}
            (folder / part / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
        else:
            save_file(copy, folder / part / f"{stem}{form}.safetensors", {"format": "pt"})
    return {"part": part, "forms": forms}


Change = Callable[[random.Random, Path], dict[str, Any]]
KINDS: dict[str, Change] = {
    **{
        name: lambda rng, folder, name=name: of_a_scheduler(rng, folder, name)  # type: ignore[misc]
        for name in sorted(SCHEDULERS)
    },
    "U-Net": of_the_unet,
    "VAE": of_the_vae,
    "resolution": of_the_resolution,
    "text": of_the_text,
    "added tokens": of_added_tokens,
    "several copies": of_several_copies,
}
VARIANTS = {"U-Net": 20, "VAE": 10, "text": 12, "added tokens": 12, "several copies": 8}
EACH = 7  # of the other kinds, 160 in all
OPTIONS = ("prompt", "negative_prompt", "num_inference_steps", "guidance_scale")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield the place of the changed folder; there is one at a time, for each takes 12 MB."""
    torch.manual_seed(0)
    level = logging.getLogger("diffusers").level
    logging.getLogger("diffusers").setLevel(logging.CRITICAL)
    yield tmp_path_factory.mktemp("variant") / "model"
    logging.getLogger("diffusers").setLevel(level)


@functools.cache
def embedded() -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(tiny.WEIGHTS, safety_checker=None)


def unchanged(folder: Path) -> dict[str, Any]:
    """Return the embedded model's parts whose files are as they were; loading them takes long."""
    parts = {}
    for part in ("unet", "vae", "text_encoder", "tokenizer"):
        found = filecmp.dircmp(folder / part, tiny.WEIGHTS / part)
        if not (found.left_only or found.right_only or found.diff_files or found.funny_files):
            parts[part] = getattr(embedded(), part)
    return parts


def theirs(folder: Path, eta: float, options: dict[str, Any]) -> np.ndarray | None:
    """Return the pipeline's picture, floats 0..1; None where it draws none."""
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            folder, safety_checker=None, **unchanged(folder)
        )
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator("cpu").manual_seed(5)
        drawn = pipeline(generator=generator, eta=eta, output_type="np", **options)
    except Exception:  # of diffusers: whatever it raises, it is no folder that the pipeline loads
        return None
    return np.asarray(drawn.images[0])


def assert_same(kind: str, seed: int, folder: Path) -> bool:
    """Assert that both draw the same from a variant; return False if the pipeline draws nothing."""
    rng = random.Random(f"{kind} {seed}")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tiny.WEIGHTS, folder)
    (folder / "__model_info__.json").unlink()  # the pipeline does not read it
    settings = {
        "prompt": PROMPT,
        "num_inference_steps": 4,
        "guidance_scale": rng.choice([1.0, 4.0, 7.5]),
    }
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            settings |= KINDS[kind](rng, folder)
    except (TypeError, ValueError):  # settings that do not go together
        return False
    options = {name: settings[name] for name in OPTIONS if name in settings}
    expected = theirs(folder, settings.get("eta", 0.0), options)
    if expected is None:
        return False
    what = f"{kind}, seed {seed}: {settings}"
    request = SamplingRequest(seed=5, eta=settings.get("eta", 0.0), **options)
    try:
        model = models.load(folder, device=torch.device("cpu"))
    except ModelArtifactError:  # a model is tried with 50 steps
        many = theirs(folder, settings.get("eta", 0.0), options | {"num_inference_steps": 50})
        assert many is None or not np.isfinite(many).all(), what
        return False
    (picture,) = sampling.generate(model, [request])
    if not np.isfinite(expected).all():
        assert picture is None, what
        return True
    assert picture is not None, what
    expected = (expected * 255).round()
    assert picture.shape == expected.shape, what
    assert np.abs(picture - expected).max() <= 1, what
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_those_of_the_pipeline(kind: str, folder: Path) -> None:
    wanted, compared = VARIANTS.get(kind, EACH), 0
    for seed in range(4 * wanted):
        compared += assert_same(kind, seed, folder)
        if compared == wanted:
            return
    pytest.fail(f"of {4 * wanted} variants the pipeline draws only {compared}")


def test_so_is_one_that_was_found_by_chance(folder: Path) -> None:
    """Eager attention, a mask and padding on the left: tokens that see nothing."""
    assert assert_same("text", 913315552, folder)


def test_so_are_ten_that_were_never_tried(folder: Path) -> None:
    for _ in range(10):
        kind, seed = random.choice(sorted(KINDS)), random.SystemRandom().randrange(10**9)
        print(f"{kind}, seed {seed}")
        assert_same(kind, seed, folder)


REFUSED: dict[str, dict[str, Iterable[Any]]] = {
    "unet": {
        "time_cond_proj_dim": (0, 32, "x", True),
        "out_channels": (8, 3, None, "4"),
        "in_channels": (9, 5, [4]),
        "num_class_embeds": (1, 1000),
        "class_embed_type": ("timestep", "identity", "projection", "simple_projection"),
        "class_embeddings_concat": (True,),
        "addition_embed_type": ("text_image", "text_time", "image", "image_hint", ["text"], {}),
        "encoder_hid_dim_type": ("text_image_proj", "image_proj", "ip_image_proj"),
    },
    "vae": {"in_channels": (1, 4, "3"), "out_channels": (1, 4, 6, None)},
    "scheduler": {"variance_type": ("learned", "learned_range")},
    "text_encoder": {"text_config": ({"hidden_act": "gelu"}, {}, 3)},
}


@pytest.mark.parametrize("part", REFUSED)
def test_what_is_not_drawn_alike_is_refused_before_weights_are_read(
    part: str, folder: Path
) -> None:
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    for key, values in REFUSED[part].items():
        for value in values:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(tiny.WEIGHTS, folder)
            say(folder / part / name, **{key: value})
            with pytest.raises(ModelArtifactError, match=key) as caught:
                sampling_request.read_facts(folder)
            assert "\n" not in str(caught.value)
