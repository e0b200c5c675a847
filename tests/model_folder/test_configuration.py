from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from dreambooth.errors import ModelArtifactError
from dreambooth.model_folder.configuration import checked

PATH = Path("base/part/config.json")
# Ways to hide a setting among others.
PLACES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "on top": lambda settings: settings,
    "in a part": lambda settings: {"vision_config": settings},
    "in a part of a part": lambda settings: {"a": {"text_config": settings}},
    "in a list": lambda settings: {"parts": [{"x": 1}, [settings]]},
}
CODE = (
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
    *("attn_implementation_autoset", "experts_implementation", "_experts_implementation_internal"),
    *("quantization_config", "custom_pipeline", "custom_pipelines", "use_kernels", "kernel_config"),
)
SIZES = (
    *("hidden_size", "intermediate_size", "projection_dim", "project_dim", "vocab_size"),
    *("type_vocab_size", "image_size", "patch_size", "max_position_embeddings", "num_labels"),
    *("block_out_channels", "in_channels", "latent_channels", "norm_num_groups", "sample_size"),
    *("cross_attention_dim", "attention_head_dim", "num_attention_heads", "conv_in_kernel"),
    *("time_embedding_dim", "num_class_embeds", "num_hidden_layers", "layers_per_block"),
    *("transformer_layers_per_block", "reverse_transformer_layers_per_block", "solver_order"),
)
# As published: Stable Diffusion 1.5 and XL, its safety checker, AltDiffusion.
HONEST: dict[str, dict[str, Any]] = {
    "unet": {
        "sample_size": 128,
        "block_out_channels": [320, 640, 1280, 1280],
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 2048,
        "layers_per_block": 2,
        "transformer_layers_per_block": [1, 2, 10, 10],
        "projection_class_embeddings_input_dim": 2816,
        "down_block_types": ["CrossAttnDownBlock2D"] * 4,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "global_step": 3_000_000,
    },
    "safety_checker": {
        "projection_dim": 768,
        "logit_scale_init_value": 2.6592,
        "vision_config": {"hidden_size": 1024, "num_hidden_layers": 24, "image_size": 224},
        "text_config": {"eos_token_id": 49407, "vocab_size": 49408, "num_hidden_layers": 12},
    },
    "text_encoder": {"vocab_size": 250_002, "pad_token_id": 1, "eos_token_id": 2},
    "vae": {"scaling_factor": 0.18215, "sample_size": 1024, "latents_mean": None},
    "scheduler": {"trained_betas": None, "timestep_spacing": "leading", "steps_offset": 1},
}


@pytest.mark.parametrize("part", HONEST)
def test_honest_configurations_stay_as_they_are(part: str) -> None:
    assert checked(PATH, HONEST[part], part) == HONEST[part]


@pytest.mark.parametrize("place", PLACES)
def test_what_would_run_foreign_code_is_left_out(place: str) -> None:
    evil = dict.fromkeys(CODE, "someone/evil-kernel")
    kept = checked(PATH, PLACES[place]({**evil, "hidden_act": "gelu"}), "safety_checker")
    assert kept == PLACES[place]({"hidden_act": "gelu"})


@pytest.mark.parametrize("place", PLACES)
def test_transformers_own_ways_to_attend_are_kept(place: str) -> None:
    own = {"_attn_implementation": "eager", "attn_implementation": "sdpa"}
    foreign = {"_attn_implementation_internal": "eager", "use_kernels": "eager"}
    assert checked(PATH, PLACES[place](own | foreign), "text_encoder") == PLACES[place](own)
    for value in ("eager ", ["eager"], {"": "eager"}, "flash_attention_2", None):
        assert checked(PATH, PLACES[place]({"_attn_implementation": value}), "unet") == PLACES[
            place
        ]({})


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("settings", [{"auto_map": {"AutoModel": "x.Y"}}, {"trust_remote_code": 1}])
def test_code_of_the_folders_own_is_refused(place: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ModelArtifactError, match=f"code of its own .{next(iter(settings))}"):
        checked(PATH, PLACES[place](settings), "unet")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["hidden_act", "act_fn", "hidden_activation"])
def test_an_activation_with_a_kernel_of_its_own_is_refused(place: str, name: str) -> None:
    with pytest.raises(ModelArtifactError, match="runs code from outside"):
        checked(PATH, PLACES[place]({name: "xielu"}), "text_encoder")


@pytest.mark.parametrize("name", SIZES)
def test_sizes_that_take_memory_or_hours_are_refused(name: str) -> None:
    for place, value in product(PLACES, (10**9, 1e9, float("inf"), float("nan"), 10**99)):
        for hidden in (value, [value], [1, [[2, value]]]):
            with pytest.raises(ModelArtifactError, match=f"{name} = .*, more than"):
                checked(PATH, PLACES[place]({name: hidden}), "unet")


@pytest.mark.parametrize(
    "settings",
    [
        {"layers_per_block": 100, "transformer_layers_per_block": [1, [100]]},
        {"layers_per_block": [100, 1], "block_out_channels": [4] * 16, "x_layers_y": 2},
        {"vision_config": {"a_layers": 60, "b_layers": [2, 60]}},
    ],
)
def test_layers_are_counted_as_they_multiply(settings: dict[str, Any]) -> None:
    with pytest.raises(ModelArtifactError, match=r"a network of \d+ layers"):
        checked(PATH, settings, "unet")


@pytest.mark.parametrize("text", ['{"a":' * 900 + "1" + "}" * 900, "[" * 900 + "1" + "]" * 900])
def test_settings_nested_without_end_are_refused(text: str) -> None:
    for config in ({"a": json.loads(text)}, {"vision_config": [json.loads(text)]}):
        with pytest.raises(ModelArtifactError, match="16 deep"):
            checked(PATH, config, "unet")


NO_NUMBERS: tuple[object, ...] = (None, "", "0.18215", [], [0.1], {}, True, float("nan"), 10**99)


@pytest.mark.parametrize(
    ("part", "name", "values"),
    [
        ("vae", "scaling_factor", (*NO_NUMBERS, 0, 0.0)),
        ("text_encoder", "eos_token_id", ("2", [2], [49407, 2], {}, 2.0, True, 2**63)),
        ("text_encoder", "pad_token_id", ("2", [2], [49407, 2], {}, 2.0, True, 10**90)),
        ("text_encoder", "bos_token_id", ("2", [2], [49407, 2], {}, 2.0, True, -(2**63) - 1)),
        ("scheduler", "timestep_spacing", (None, "", "Leading", "other", 7, [], ["leading"], {})),
        ("scheduler", "beta_start", NO_NUMBERS[:-1]),
        ("scheduler", "beta_end", NO_NUMBERS[:-1]),
        ("scheduler", "trained_betas", (0, 0.1, "", "x", [], [0.1], [0.1] * 999, ["x"] * 1000, {})),
        ("scheduler", "trained_betas", ([0.1] * 999 + [None], [0.1] * 999 + [float("nan")])),
    ],
)
def test_values_that_no_picture_can_be_drawn_with_are_refused(
    part: str, name: str, values: tuple[object, ...]
) -> None:
    for value in values:
        with pytest.raises(ModelArtifactError, match=name) as caught:
            checked(PATH, {name: value}, part)
        assert len(str(caught.value)) < 300
